"""A classifier of faces from a file in ONNX format, for judges that no Python package carries."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


class OnnxJudge:
    """Say how probable a person is in crops of faces.

    The file holds a network from floats in [0, 1], (n, 3, height, width), to logits (n, people);
    what it does to the range is its own. ``place`` is the person's logit. The score of Selective
    Amnesia comes from Giphy's detector of celebrities, which has to be exported to such a file.

    Raises: FileNotFoundError if there is no such file, and ImportError without ONNX Runtime.
    """

    def __init__(self, path: Path, place: int):
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no judge in {path}; export a classifier of people with "
                "torch.onnx.export, or set judge: none, which leaves its score out."
            )
        try:
            from onnxruntime import InferenceSession
        except ImportError:
            raise ImportError(
                "A judge in ONNX format needs ONNX Runtime, which is not installed; run 'pip "
                "install onnxruntime'."
            ) from None
        self.session, self.place = InferenceSession(str(path)), place
        self.input = self.session.get_inputs()[0]

    def __call__(self, crops: list[Tensor]) -> Tensor:
        """Return probabilities (n,) for uint8 crops (3, ...) of any size."""
        size = tuple(self.input.shape[2:])
        scaled = [F.interpolate(c[None].cpu().float() / 255, size, mode="bilinear") for c in crops]
        (logits,) = self.session.run(None, {self.input.name: torch.cat(scaled).numpy()})
        return torch.from_numpy(logits).softmax(1)[:, self.place]
