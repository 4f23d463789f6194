#!/bin/sh
# Gates a model in any CI: runs a recipe, keeps its report, comments its table on the pull request, ends with the gate's
# exit code, and promotes what it registered when asked to. docs/ci.md says how to call it.
#
#   gate.sh [--promote] RECIPE [KEY=VALUE]...
#
# From the environment:
#   PENNYWEIGHT                the command, `pennyweight`
#   PENNYWEIGHT_RUNS           where runs are written, `runs`
#   PENNYWEIGHT_REPORT         the folder to keep: report.html, run.json, verdicts.xml, comment.md; `pennyweight-report`
#   PYTHON                     `python3`; needed for the comment and for --promote
# A comment is written where there is a token and a pull request:
#   GITHUB_TOKEN, GITHUB_REPOSITORY, GITHUB_API_URL, and the number in GITHUB_REF or PENNYWEIGHT_PULL_REQUEST
#   GITLAB_TOKEN, CI_API_V4_URL, CI_PROJECT_ID, CI_MERGE_REQUEST_IID
set -eu

pennyweight=${PENNYWEIGHT:-pennyweight}
python=${PYTHON:-python3}
runs=${PENNYWEIGHT_RUNS:-runs}
report=${PENNYWEIGHT_REPORT:-pennyweight-report}

say() {
    printf '%s\n' "$*" >&2
}

meaning() {
    case $1 in
        0) echo "passed: there is a winner" ;;
        1) echo "failed: nothing passed, or nothing is surely cheaper" ;;
        2) echo "failed: a bad recipe, or a wrong call" ;;
        3) echo "inconclusive: more samples are needed" ;;
        4) echo "failed: a stage failed" ;;
        *) echo "failed: it was stopped" ;;
    esac
}

job_url() {
    if [ -n "${GITHUB_RUN_ID:-}" ]; then
        echo "${GITHUB_SERVER_URL:-https://github.com}/${GITHUB_REPOSITORY:-}/actions/runs/$GITHUB_RUN_ID"
    else
        echo "${CI_JOB_URL:-}"
    fi
}

write_comment() {
    printf '%s\n' "$marker"
    if [ -s "$report/run.json" ]; then
        "$pennyweight" show "$report/run.json" --markdown || printf '### `%s`\n' "$recipe"
    else
        printf '### `%s`\n\nThere is no outcome; the log of the job says why.\n' "$recipe"
    fi
    printf '\nThe gate %s (exit code %s).' "$(meaning "$code")" "$code"
    url=$(job_url)
    if [ -n "$url" ]; then
        printf ' [Log and report](%s)' "$url"
    fi
    printf '\n'
}

# METHOD URL [FILE]: the token goes through a pipe, so that no list of processes shows it.
call() {
    method=$1
    address=$2
    shift 2
    printf 'header = "%s"\n' "$authorization" | curl --config - --silent --show-error --fail --max-time 60 \
        --request "$method" --header 'Content-Type: application/json' ${1:+--data "@$1"} "$address"
}

# Sets where comments are listed and written, how one is changed, and who asks. Fails where there is nothing to comment.
find_pull_request() {
    number=${PENNYWEIGHT_PULL_REQUEST:-}
    case ${GITHUB_REF:-} in
        refs/pull/*)
            number=${number:-${GITHUB_REF#refs/pull/}}
            number=${number%%/*}
            ;;
    esac
    if [ -n "${GITHUB_TOKEN:-}" ] && [ -n "${GITHUB_REPOSITORY:-}" ] && [ -n "$number" ]; then
        issues="${GITHUB_API_URL:-https://api.github.com}/repos/$GITHUB_REPOSITORY/issues"
        authorization="Authorization: Bearer $GITHUB_TOKEN"
        comments="$issues/$number/comments"
        one="$issues/comments"
        change=PATCH
    elif [ -n "${GITLAB_TOKEN:-}" ] && [ -n "${CI_MERGE_REQUEST_IID:-}" ]; then
        authorization="PRIVATE-TOKEN: $GITLAB_TOKEN"
        comments="$CI_API_V4_URL/projects/$CI_PROJECT_ID/merge_requests/$CI_MERGE_REQUEST_IID/notes"
        one=$comments
        change=PUT
    else
        return 1
    fi
}

# A later run of the same recipe writes over its comment.
post_comment() {
    "$python" -c 'import json, sys; print(json.dumps({"body": sys.stdin.read()}))' <"$report/comment.md" >"$body" || return 1
    listed=$(call GET "$comments?per_page=100") || return 1
    id=$(printf '%s' "$listed" | "$python" -c '
import json, sys
ours = [comment["id"] for comment in json.load(sys.stdin) if comment["body"].startswith(sys.argv[1])]
print(ours[0] if ours else "")' "$marker") || return 1
    if [ -n "$id" ]; then
        call "$change" "$one/$id" "$body" >/dev/null || return 1
    else
        call POST "$comments" "$body" >/dev/null || return 1
    fi
}

# The version that this run registered, not whatever is challenger by now.
promote() {
    registered=$("$python" -c '
import json, sys
found = json.load(open(sys.argv[1]))["registered"]
print(found["version"], found["model"]) if found else None' "$report/run.json")
    if [ -z "$registered" ]; then
        say "error: nothing was registered, so nothing can be promoted"
        say "hint: give the recipe \`register: NAME\`"
        return 2
    fi
    "$pennyweight" promote "${registered#* }" --version "${registered%% *}"
}

promoting=
if [ "${1:-}" = --promote ]; then
    promoting=yes
    shift
fi
if [ $# -eq 0 ]; then
    say "usage: gate.sh [--promote] RECIPE [KEY=VALUE]..."
    exit 2
fi
recipe=$1
marker="<!-- pennyweight: $recipe -->"

mkdir -p "$report"
rm -f "$report/run.json" "$report/report.html" "$report/verdicts.xml" "$report/comment.md"
code=0
"$pennyweight" run "$@" --runs "$runs" --json >"$report/run.json" || code=$?
if [ -s "$report/run.json" ]; then
    cp "$("$pennyweight" report "$report/run.json")" "$report/report.html" || say "warning: there is no report"
    "$pennyweight" show "$report/run.json" --junit "$report/verdicts.xml" || true
fi
write_comment >"$report/comment.md"
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
    cat "$report/comment.md" >>"$GITHUB_STEP_SUMMARY"
fi
if find_pull_request; then
    body=$(mktemp)
    post_comment || say "warning: the comment was not written; the gate does not depend on it"
    rm -f "$body"
fi
say "the gate $(meaning "$code") (exit code $code)"
if [ "$code" -eq 0 ] && [ -n "$promoting" ]; then
    promote
fi
exit "$code"
