"""The tensors of a Hugging Face checkpoint folder, opened lazily and read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class CheckpointFiles:
    """A folder's *.safetensors, single or sharded with an index. `framework` is safetensors' name for the kind of
    array that `read` gives: "pt" or "np". Raises FileNotFoundError naming a file that is missing."""

    def __init__(self, folder: Path, framework: str) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        absent = [name for name in names if not (folder / name).exists()]
        if absent or not names:
            what = f"{index.name} lists {absent[0]}, which is missing" if absent else "no *.safetensors file"
            raise FileNotFoundError(f"model={str(folder)!r}: {what}; give a complete checkpoint folder")
        self._files: dict[str, Any] = {}
        for name in names:
            file = safe_open(folder / name, framework=framework)
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                self._files[key] = file
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str, box: tuple[slice, ...]) -> Any:
        """The part of a tensor that lies in `box`, and no more of it."""
        return self._files[name].get_slice(name)[box]
