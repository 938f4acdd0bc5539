"""Where the evidence keeps what it has drawn and read: by the weights it was drawn with, so that nothing of another family
counts. Pairs of weights that do not ship have their rows in `recorded.json`, as drawn when they were trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..family.layout import NAMES
from .rows import Row

RECORDED = Path(__file__).with_name("recorded.json")
BASE = ("mllm", "diffusion_models", "vae")


class Kept:
    """work: a folder of rows, each {"angles": (n, 2) degrees, "traits": {name: (n,) indices}, "seconds"} as JSON beside a
    strip of its first pictures. models: the family's folder. recorded: the file of rows whose weights are not there."""

    def __init__(self, work: Path, models: Path, recorded: Path = RECORDED):
        self.work, self.models, self.recorded = work, models, recorded
        names = {**NAMES, "mllm": f"{NAMES['mllm']}/model.safetensors"}
        self.base = digest(*(models / kind / names[kind] for kind in BASE), models.parent / "oracle.safetensors")
        self._pairs: dict[str, str] = {}
        record = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
        self._record = record if record.get("base") == self.base else {"rows": {}, "trained": {}}

    def drawable(self, row: Row) -> bool:
        return all(file.exists() for file in self._weights(row.arm))

    def file(self, row: Row) -> Path:
        if row.arm not in self._pairs:
            self._pairs[row.arm] = digest(*self._weights(row.arm))
        return self.work / f"{row.key}-{self.base}-{self._pairs[row.arm]}.json"

    def read(self, row: Row) -> dict | None:
        """A row's result; None where it was not drawn."""
        if not self.drawable(row):
            return self._record["rows"].get(row.key)
        file = self.file(row)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def record(self, rows: Sequence[Row]) -> None:
        """Writes these rows, and how their weights were trained, for readers without them."""
        found = {row.key: result for row in rows if (result := self.read(row))}
        for result in found.values():
            result["angles"] = [[round(angle, 3) for angle in pair] for pair in result["angles"]]
        trained = self._record["trained"]
        for arm in {row.arm for row in rows}:
            told = self.models / "dla" / f"{arm}.json"
            if told.exists():
                whole = json.loads(told.read_text(encoding="utf-8"))
                trained[arm] = {name: whole[name] for name in ("stages", "seconds")}
        lines = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(result, separators=(',', ':'))}" for key, result in found.items()
        )
        head = json.dumps({"base": self.base, "trained": dict(sorted(trained.items()))})[:-1]
        self.recorded.write_text(f'{head}, "rows": {{\n{lines}\n}}}}\n', encoding="utf-8")

    def _weights(self, arm: str) -> tuple[Path, Path]:
        return tuple(self.models / kind / f"{arm}.safetensors" for kind in ("dla", "loras"))


def digest(*files: Path) -> str:
    together = hashlib.sha256()
    for file in files:
        together.update(hashlib.sha256(file.read_bytes()).digest())
    return together.hexdigest()[:10]
