"""`distml show` of a run that acts: one greedy episode of its best checkpoint as an animated picture, episode.gif."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distml.errors import UsageError
from distml.runs.directory import RunDirectory
from distml.spec.loader import load_spec
from distml.spec.rl import ActingBlock
from distml.spec.rllib import RLlibSpec
from distml.spec.schema import JobSpec

if TYPE_CHECKING:
    from distml.launch.evaluate import TrainedModel

Array = NDArray[Any]

MAX_FRAMES = 500
LARGEST_SIDE = 320  # pixels
FRAME_MS = 40


def draw_episode(run: Path) -> str | None:
    """Write RUN/episode.gif; what to say about it, None where there is nothing to show.

    A run that does not act has no picture; nor has one of RLlib, one without a checkpoint, or one that plays what
    cannot be drawn, which is said.
    """
    directory = RunDirectory.view(run)
    if directory.read_spec_text() is None:
        return None
    job = load_spec(directory.spec).job
    if isinstance(job, RLlibSpec):
        return "no episode.gif: episodes of RLlib's algorithms are not drawn"
    if not isinstance(job, JobSpec) or not isinstance(job.task, ActingBlock):
        return None
    from distml.launch.evaluate import load_model

    try:
        frames, total, steps = play(load_model(run))
        write_gif(directory.episode, frames)
    except UsageError as error:
        return f"no episode.gif: {error}"
    except OSError as error:
        return f"no episode.gif: {error.strerror or error}"
    return f"episode: {directory.episode} ({steps} steps, return {total:g})"


def play(trained: TrainedModel) -> tuple[list[Array], float, int]:
    """Pictures [H, W, 3] uint8, return and length of one greedy episode on a seed that training never sees.

    Raises:
        UsageError: the environment cannot be drawn.
    """
    from distml.rl.environments import Environments, evaluation_seeds, uses_own_vector_form
    from distml.rl.evaluation import Plays, unclipped

    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen and a sound card
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    task = trained.task
    assert isinstance(task, Plays)
    spec = unclipped(task.spec.environment)
    draws_itself = not uses_own_vector_form(spec, together=False)  # others show what the policy sees
    if draws_itself:
        spec = spec.model_copy(update={"args": {**spec.args, "render_mode": "rgb_array"}})
    environments = Environments(spec, evaluation_seeds("test", range(1)), together=False)
    act = task.greedy(trained.model, 1)
    with contextlib.closing(environments):
        observations, first = environments.reset(), np.ones(1, dtype=bool)
        frames, total, steps = [picture(environments, observations, draws_itself)], 0.0, 0
        while steps < MAX_FRAMES:
            transition = environments.step(act(observations, first))
            observations, first = transition.observations, np.zeros(1, dtype=bool)
            frames.append(picture(environments, observations, draws_itself))
            total, steps = total + float(transition.rewards[0]), steps + 1
            if transition.terminated[0] or transition.truncated[0]:
                break
    return frames, total, steps


def picture(environments: Any, observations: Array, draws_itself: bool) -> Array:
    """[H, W, 3] uint8 of the one environment now.

    Raises:
        UsageError: it cannot be drawn.
    """
    if not draws_itself:
        newest: Array = observations[0, -1]
        return np.repeat(newest[..., None], 3, -1)
    name = environments.spec.id
    try:
        rendered = environments.vector.render()
    except Exception as error:
        extra = "; pip install 'distml[render]'" if "pygame" in str(error) else ""
        raise UsageError(f"environment {name} cannot be drawn: {error}{extra}") from None
    if not rendered or not isinstance(rendered[0], np.ndarray):
        raise UsageError(f"environment {name} draws no rgb_array")
    drawn: Array = rendered[0]
    return drawn


def write_gif(path: Path, frames: list[Array]) -> None:
    """Pictures as an animation that plays for ever, at most `LARGEST_SIDE` pixels wide and high."""
    from PIL import Image

    images = []
    for frame in frames:
        image = Image.fromarray(frame)
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        images.append(image.quantize(32))
    images[0].save(path, save_all=True, append_images=images[1:], duration=FRAME_MS, loop=0, optimize=True)
