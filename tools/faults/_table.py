"""What the pack is to bear: the one list of keys, limits and the files that measure them.

A file of this folder has `main(argv)` and prints, last, one JSON object with its keys; a key of several files is their
sum. Lists of the same name, such as `bad_files_unclear`, are joined.
"""

from ..tables import Row, Table

BAD_FILES: tuple[str, ...] = ("bad_files", "bad_training_files")  # those that damage files
BAD_INPUTS: tuple[str, ...] = ("bad_inputs",)  # those that draw nodes' inputs
ROWS = (
    Row("bad_files_tried", "damaged or hostile files", 300, BAD_FILES, "≥"),
    Row("bad_files_clear", "of them refused with file and reason, or read rightly", "bad_files_tried", BAD_FILES, "="),
    Row("training_files_tried", "of them of training and benchmarks", 150, "bad_training_files", "≥"),
    Row("training_files_clear", "of these clear", "training_files_tried", "bad_training_files", "="),
    Row("server_restarts", "servers that had to be started again for a damaged file", 0, "bad_served"),
    Row("inputs_tried", "inputs drawn for nodes", 1000, BAD_INPUTS, "≥"),
    Row("unclear_errors", "of them that end in another's traceback, or in NaN", 0, BAD_INPUTS),
    Row("faults_tried", "faults in a running server", 60, "injected", "≥"),
    Row("faults_lost", "of them after which something was lost", 0, "injected"),
    Row("leaks_between_prompts", "pictures with something of another prompt in them", 0, "injected"),
    Row("long_run_prompts", "prompts of varying settings through one server", 1000, "long_run", "≥"),
    Row("long_run_growth", "growth of its memory after the warm-up", 0.03, "long_run"),
    Row(
        "long_run_slowdown",
        "processor's seconds of a prompt over those of a server that has drawn 100",
        1.05,
        "long_run",
    ),
    Row("long_run_missing", "pictures missing", 0, "long_run"),
    Row("long_run_differing", "of those compared, other than the same settings give alone", 0, "long_run"),
)
TABLE = Table(__package__, "faults", "kind of fault", ROWS, {})
