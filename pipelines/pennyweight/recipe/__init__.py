"""The recipe: everything a user can declare, how it is read, and how its errors read.

The command line's help, the docs and `recipes/schema.json` come from these settings. Validation is pure: it reads the
recipe, the shipped suites, tasks, data pins and prices, and the prices in `PENNYWEIGHT_PRICES`, and nothing else.
"""

from pennyweight.recipe.calibration import Calibration, names_of
from pennyweight.recipe.learning import Distill, DrawnStudent, Generate, OnPolicy, Recover, TeacherCache
from pennyweight.recipe.load import SOURCE_SCHEMES, is_suite, load_recipe, load_suite, task_fault
from pennyweight.recipe.prices import ApiPrice, Ceilings, Owned, Prices, PriceSpec, load_prices
from pennyweight.recipe.pruning import Prune
from pennyweight.recipe.quantizing import ACTIVATIONS, CALIBRATED, PER_CHANNEL, Budget, Quantize, scheme_bits
from pennyweight.recipe.schema import WORKLOADS, Base, Benchmark, DataSource, LeverName, Recipe, RuntimeName, Slo
from pennyweight.recipe.steps import STEPS, From, Step

__all__ = [
    "ACTIVATIONS",
    "CALIBRATED",
    "PER_CHANNEL",
    "SOURCE_SCHEMES",
    "STEPS",
    "WORKLOADS",
    "ApiPrice",
    "Base",
    "Benchmark",
    "Budget",
    "Calibration",
    "Ceilings",
    "DataSource",
    "Distill",
    "DrawnStudent",
    "From",
    "Generate",
    "LeverName",
    "OnPolicy",
    "Owned",
    "PriceSpec",
    "Prices",
    "Prune",
    "Quantize",
    "Recipe",
    "Recover",
    "RuntimeName",
    "Slo",
    "Step",
    "TeacherCache",
    "is_suite",
    "load_prices",
    "load_recipe",
    "load_suite",
    "names_of",
    "scheme_bits",
    "task_fault",
]
