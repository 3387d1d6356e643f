"""A student on a model hub: `Shared("student/").push_to_hub("me/tagger")`, and back by
`Shared.from_pretrained("me/tagger").student`."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from kdlib.ship import runtime


class Shared(ModelHubMixin, library_name="kdlib", tags=["token-classification", "onnx"]):
    """A student's folder, as Hugging Face's mixin moves it: every file as it is, its card too."""

    def __init__(self, folder: str) -> None:
        self.folder, self.student = Path(folder).expanduser(), runtime.load(folder)
        self._own = (self.folder / runtime.CONFIG).read_bytes()

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.folder.resolve() != Path(save_directory).resolve():
            shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)
        (save_directory / runtime.CONFIG).write_bytes(self._own)  # the mixin has deleted it

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **how: Any) -> "Shared":
        """From a folder, or a hub's repository at a revision; `how`: the mixin's own options."""
        if Path(model_id).is_dir():
            return cls(model_id)
        return cls(snapshot_download(model_id, revision=revision, **how))
