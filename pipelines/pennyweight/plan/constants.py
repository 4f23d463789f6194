"""What the estimates are made of: measured on two-core machines with SmolLM2-135M."""

from __future__ import annotations

from dataclasses import dataclass

MB = 10**6

#: Seconds until a library can be used, paid once a process.
IMPORT_SECONDS = {
    "transformers": 6.0,
    "llmcompressor": 3.0,
    "auto-round": 3.0,
    "onnxruntime": 1.0,
    "openvino": 1.0,
    "lm-eval": 4.0,
    "mlflow": 4.0,
}
#: Seconds that the ONNX builder's own process takes before it touches the model.
BUILDER_SECONDS = 9.0
#: Seconds for a gigabyte of weights, read and written together, by what is done to them. `repack` comes on top of
#: `export` where integers are rewritten for the builder and compared with the file afterwards.
SECONDS_PER_GB = {"convert": 20.0, "round": 15.0, "export": 4.0, "repack": 20.0, "load": 1.5, "copy": 2.0}
#: Seconds that a runtime takes, beyond the reading, to make a graph of a file: once to score, once to generate.
GRAPH_SECONDS = {"openvino": 6.0}
#: Bytes a second from the network; a guess, and the plan says so.
DOWNLOAD_BYTES_PER_SECOND = 10e6
#: Seconds of GPTQ's solve for each weight; its inner loop runs column by column.
GPTQ_SECONDS_PER_WEIGHT = 2e-7
#: Seconds for each weight to search the scales of smallest error.
SEARCH_SECONDS_PER_WEIGHT = 6e-8
#: Fraction of the measured rate of products at which training's run, by the dtype that it computes in.
TRAINING_EFFICIENCY = {"float32": 0.55, "bfloat16": 0.25, "float16": 0.25}
#: The same where all weights learn, and none is made from integers.
DISTILLING_EFFICIENCY = {"float32": 0.55, "bfloat16": 0.55, "float16": 0.55}
#: Seconds to compare one logit with the base's: two softmaxes and the divergence.
COMPARE_SECONDS_PER_LOGIT = 2.5e-9
#: Seconds to cut a text into windows of tokens.
WINDOWS_SECONDS = 2.0
#: Seconds to create MLflow's database and to log a run, beyond the copy of the winner's files.
TRACK_SECONDS = 4.0

#: Resident memory of this process once the libraries of a stage are loaded, without any weights.
BASELINE_BYTES = {
    "source": 500 * MB,
    "data": 500 * MB,
    "quantize": 900 * MB,
    "recover": 900 * MB,
    "distill": 900 * MB,
    "export": 1300 * MB,
    "reference": 900 * MB,
    "evaluate": 900 * MB,
    "benchmark": 900 * MB,
    "levers": 900 * MB,
    "track": 900 * MB,
}
#: The same for the ONNX builder's own process.
BUILDER_BYTES = 340 * MB
#: Bytes for each weight of the largest quantized layer, at the moment when its integers are packed or repacked.
PACKING_BYTES = {"quantize": 16, "export": 36}
#: A runtime's memory for each byte of exported weights; some are kept a second time, rearranged for its kernels.
COPIES = {"onnxruntime": 1.2, "openvino": 2.5}
#: Activations alive at once, in units of (tokens, intermediate size).
ACTIVATION_COPIES = 12
#: Tokens that an export's parity check scores, and those of one question with one answer.
PARITY_TOKENS = 1024
QUESTION_TOKENS = 40
#: Sequences that gptq calibrates on together.
CALIBRATION_BATCH = 8
#: Shape of the wave that warms a candidate up before those that are counted: tokens in, at most, and out.
WARM_UP = (16, 2)


@dataclass(frozen=True)
class Efficiency:
    """How much of the machine's measured speed a runtime turns into tokens."""

    product: float
    """Fraction of the measured matrix-product rate while scoring."""
    prefill: float
    """The same while reading a wave's prompts."""
    decode: float
    """The same in one decoding step of many requests, where products are thin."""
    read: float
    """Fraction of the measured read speed at which a decoding step streams the weights."""
    layer_seconds: float
    """Time of one layer's calls that no speed changes, for each forward pass."""


#: (runtime, what it multiplies in) → its efficiency; `integers` are rated against float32, float16 against bfloat16.
EFFICIENCY = {
    ("transformers", "float32"): Efficiency(0.60, 0.60, 0.58, 0.80, 9.0e-4),
    ("transformers", "bfloat16"): Efficiency(0.68, 0.50, 0.25, 0.60, 1.4e-3),
    ("transformers", "float16"): Efficiency(0.30, 0.30, 0.15, 0.60, 1.4e-3),
    ("onnxruntime", "float32"): Efficiency(0.70, 0.45, 0.42, 0.58, 1.0e-4),
    ("onnxruntime", "float16"): Efficiency(0.40, 0.30, 0.15, 0.58, 1.0e-4),
    ("onnxruntime", "integers"): Efficiency(1.60, 0.50, 0.40, 0.42, 1.0e-4),
    ("openvino", "float32"): Efficiency(0.75, 0.60, 0.60, 0.70, 1.0e-4),
    ("openvino", "bfloat16"): Efficiency(1.00, 0.95, 0.85, 0.60, 1.0e-4),
    ("openvino", "integers"): Efficiency(1.80, 1.50, 1.30, 0.60, 1.0e-4),
}

#: Task → (items, requests an item, tokens a request), counted on the shipped data with a 49,152-word vocabulary.
TASK_SHAPES = {"piqa": (1500, 2, 28), "openbookqa": (500, 4, 18), "commonsense_qa_cloze": (1221, 5, 22)}
#: The same for a task that is not in the table.
UNKNOWN_TASK = (1000, 4, 40)
