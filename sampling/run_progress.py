"""What a staged run says of itself while it runs, to the editor: step, stage, strengths and time left."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from .reference_stages import Moment


class RunProgress:
    """A sampler's callback around another one, which may be None; it tells each step once.

    Args:
        moment: Of the last model call.
        send: Takes what there is to say, as JSON can hold it.
        callback: The host's, with its preview and progress bar.
    """

    def __init__(
        self, moment: Callable[[], Moment], send: Callable[[dict[str, Any]], None], callback: Callable | None = None
    ):
        self.moment, self.send, self.callback = moment, send, callback
        self._began: float | None = None  # end of the first step, which may load and compile

    def begin(self, sigmas: Sequence[float], tokens: int, model_sampling: Any) -> None:
        """Says what the editor needs to draw the steps of the next run.

        Args:
            sigmas: n + 1 noise levels for n steps.
            tokens: Noisy image tokens.
            model_sampling: The host's object that says what a sigma of the model means.
        """
        levels = {key: getattr(model_sampling, key, None) for key in ("shift", "multiplier")}
        levels = {key: float(value) for key, value in levels.items() if isinstance(value, (int, float))}
        said: dict[str, Any] = {"sigmas": list(sigmas), "tokens": tokens}
        if "shift" in levels:
            said["model_sampling"] = levels
        self.send({"begin": said, "text": f"step 0/{len(sigmas) - 1}"})

    def __call__(self, step: int, denoised: Any, x: Any, total: int) -> None:
        """After each step of the sampler, which counts from 0."""
        if self.callback is not None:
            self.callback(step, denoised, x, total)
        now, done = time.monotonic(), step + 1
        if self._began is None:
            self._began, left = now, None
        else:
            left = (now - self._began) / step * (total - done) if step else None
        moment = self.moment()
        self.send({"step": done, "steps": total, "text": step_text(moment, done, total, left)})


def step_text(moment: Moment, step: int, steps: int, seconds: float | None) -> str:
    """Such as `step 7/20, stage 2: MLLM 1.00, VAE 0.50, 12 s left`; None: the time left is not known."""
    text = (
        f"step {step}/{steps}, stage {moment.keyframes[0] + 1}: MLLM {moment.context:.2f}, VAE {moment.reference:.2f}"
    )
    if seconds is None or step >= steps:
        return text
    minutes, rest = divmod(round(seconds), 60)
    return f"{text}, {f'{minutes} min ' * bool(minutes)}{rest} s left"
