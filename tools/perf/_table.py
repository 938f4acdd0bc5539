"""What the pack is to reach in speed and memory: the one list of keys, limits and benchmarks."""

from ..tables import Row, Table

ROWS = (
    Row("import_seconds", "importing the pack at server start, s", 0.10, "importing"),
    Row("step_overhead", "a step at strengths 1/1 with the patch over the host's", 1.01, "steps"),
    Row("step_overhead_guider", "the same with the guider", 1.01, "steps"),
    Row(
        "staged_over_both",
        "a run on the paper's schedule over one with both throughout",
        "staged_over_both_predicted",
        "staged",
        "±",
    ),
    Row(
        "staged_over_both_2048",
        "the same with four times the MLLM tokens",
        "staged_over_both_2048_predicted",
        "staged",
        "±",
    ),
    Row("strength_overhead", "a step at strengths between 0 and 1 over one at 1/1 (on a CPU: 1.05)", 1.10, "steps"),
    Row("region_overhead", "a step with two references bound to regions over one unbound", 1.10, "steps"),
    Row("dla_time", "the DLA with scores from heads over its plain form", 0.90, "dla"),
    Row("dla_subset_time", "every third layer over the plain form of all", 0.35, "dla"),
    Row("dla_memory", "its peak beyond inputs and outputs over the input", 0.25, "dla"),
    Row("batch_drift", "100 prompts on one subject: last ten over first ten", 1.05, "batch"),
    Row("batch_growth", "growth of the server's memory over them", 0.02, "batch"),
    Row(
        "million_start",
        "training: start to first step the second time (100,000 pairs; --full: a million), s",
        30,
        "million",
    ),
    Row("million_memory", "memory that it takes beyond the process before, GB", 1, "million"),
    Row("fleet", "a benchmark over N servers: N times its time over that of one", 1.15, "fleet"),
    Row("reencode", "a new prompt on references seen before over the first", 0.15, "encode"),
    Row("vae_encodes", "VAE encodes for a new prompt on the same reference", 0, "encode"),
)
# The benchmarks that take the option --full.
FULL = ("steps", "staged", "million", "dla", "encode")
TABLE = Table(__package__, "bench", "benchmark", ROWS, {"--full": FULL})
