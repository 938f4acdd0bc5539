"""The evidence's results on disk, each filed under the weights that drew it, so that no other family's count.

Pairs of weights that do not ship have theirs in `recorded.json`, as drawn when they were trained.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..family.layout import NAMES
from .rows import Row

RECORDED = Path(__file__).with_name("recorded.json")
BASE = ("mllm", "diffusion_models", "vae")


class ResultStore:
    """Results by row: {"angles": (n, 2) degrees, "traits": {name: (n,) indices}, "seconds"}.

    Args:
        work: Folder of results as JSON, each beside a strip of its first pictures.
        models: The family's models folder.
        recorded: File of the results whose weights are not in `models`.
    """

    def __init__(self, work: Path, models: Path, recorded: Path = RECORDED):
        self.work, self.models, self.recorded = work, models, recorded
        names = {**NAMES, "mllm": f"{NAMES['mllm']}/model.safetensors"}
        self.base = _digest(*(models / kind / names[kind] for kind in BASE), models.parent / "oracle.safetensors")
        self._digests: dict[str, str] = {}
        record = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
        self._record = record if record.get("base") == self.base else {"rows": {}, "trained": {}}

    def has_weights(self, row: Row) -> bool:
        """Whether the row's DLA and LoRA are there, so that it can be drawn."""
        return all(file.exists() for file in self._weights(row.arm))

    def path(self, row: Row) -> Path:
        """The row's file in the work folder."""
        if row.arm not in self._digests:
            self._digests[row.arm] = _digest(*self._weights(row.arm))
        return self.work / f"{row.key}-{self.base}-{self._digests[row.arm]}.json"

    def read(self, row: Row) -> dict | None:
        """The row's result; None where it was not drawn."""
        if not self.has_weights(row):
            return self._record["rows"].get(row.key)
        file = self.path(row)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def record(self, rows: Sequence[Row]) -> None:
        """Writes the results of these rows, and how their weights were trained, into the file `recorded`."""
        results = {row.key: result for row in rows if (result := self.read(row))}
        for result in results.values():
            result["angles"] = [[round(angle, 3) for angle in pair] for pair in result["angles"]]
        trained = self._record["trained"]
        for arm in {row.arm for row in rows}:
            file = self.models / "dla" / f"{arm}.json"
            if file.exists():
                training = json.loads(file.read_text(encoding="utf-8"))
                trained[arm] = {name: training[name] for name in ("stages", "seconds")}
        lines = [f"{json.dumps(key)}: {json.dumps(result, separators=(',', ':'))}" for key, result in results.items()]
        head = json.dumps({"base": self.base, "trained": dict(sorted(trained.items()))})[:-1]
        text = ",\n".join(lines)
        self.recorded.write_text(f'{head}, "rows": {{\n{text}\n}}}}\n', encoding="utf-8")

    def _weights(self, arm: str) -> tuple[Path, Path]:
        return tuple(self.models / kind / f"{arm}.safetensors" for kind in ("dla", "loras"))


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:10]
