"""A few kills of tests/kills.py at every run of the tests; `python tests/kills.py` does a hundred."""

from tests import kills as harness
from tests.mutants import kills


@kills(
    "llama/metrics.py", '[row for row in read(path) if row["step"] <= start] if start', "read(path) if start"
)
@kills("train.py", 'self.stream: str = saved.get("stream", "")', 'self.stream: str = ""')
def test_a_killed_run_becomes_what_it_would_have():
    for out in harness.attacks(["adamw", "galore_8bit"], kills=8, seed=3):
        assert out.same and out.kills == 4 and out.resumes > 0, out
