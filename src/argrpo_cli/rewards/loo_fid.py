"""loo-fid: what an image does for the distance of all images of an update to real ones (arXiv 2603.23086).

The distance is a Fréchet distance of Gaussians with diagonal covariances, of moments of features x [N, D],

    FID = |mu_r - mu_g|^2 + |sigma_r - sigma_g|^2,    mu = mean x,    sigma^2 = mean x^2 - mu^2,

and an image's reward is what it would rise by without it, r_i = FID(all but i) - FID(all): above 0 where the image
brings the set nearer. Sums over all images make it O(N D) for all i together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Lt

from argrpo_cli.rewards.base import File, Needs, Reward
from argrpo_cli.rewards.features import ADM_NAME, ADM_URL, Features
from argrpo_cli.shapes import Condition
from argrpo_cli.system.errors import UserError
from argrpo_cli.system.files import user_cache

if TYPE_CHECKING:
    from torch import Tensor


WIDEST = 4096  # features of a reference; Inception has 2048


class Moments(NamedTuple):
    """Of features less the reference's mean, float64 [..., D]: their mean, and the mean of their squares."""

    mean: Tensor
    square: Tensor

    def mixed(self, other: Moments, share: float) -> Moments:
        """(1 - share) of these and `share` of others: moments of the distributions' mixture."""
        return Moments(*((1 - share) * own + share * another for own, another in zip(self, other, strict=True)))

    def distance(self, deviation: Tensor) -> Tensor:
        """FID [...] to the reference, of this standard deviation [D]."""
        own = (self.square - self.mean.square()).clamp(min=0).sqrt()
        return (self.mean.square() + (deviation - own).square()).sum(-1)


def with_and_without(x: Tensor) -> tuple[Moments, Moments]:
    """Moments of rows x float64 [N, D], and [N, D] of all rows but each."""
    first, second, n = x.sum(0), x.square().sum(0), len(x)
    return Moments(first / n, second / n), Moments((first - x) / (n - 1), (second - x.square()) / (n - 1))


def leave_one_out(x: Tensor, deviation: Tensor, running: Moments | None = None, decay: float = 0.0) -> Tensor:
    """r_i = FID(all but i) - FID(all), float64 [N].

    Args:
        x: features less the reference's mean, float64 [N, D].
        deviation: the reference's, float64 [D].
        running: moments of earlier updates, of which FID sees `decay` and of this batch, whole or without image i, the
            rest: what the running moments would be after an update with or without the image.
    """
    moments = with_and_without(x)
    if running is not None:
        moments = tuple(running.mixed(one, 1 - decay) for one in moments)
    whole, without = (one.distance(deviation) for one in moments)
    return without - whole


class LooFid(Reward):
    """What FID would rise by without the image, in the features' squared unit; of the order of FID / N.

    Its values are small and their scale is nobody's: let each reward be normalised before the sum
    (`grpo.aggregation: normalize_then_sum`, `grpo.scale_rewards: none`), with weight 2 as in the paper.

    Args:
        features: `inception`, at full size; `nano`, those of the nano judge.
        reference: an .npz with `mu` and `sigma` (or its diagonal, `sigma_diagonal`) of real images in the same
            features, as ADM's. `adm-256` is ADM's reference batch of ImageNet, where `argrpo eval imagenet` has put it;
            nano has the judge's own reference scenes.
        weights: a local file of Inception's weights in the place of torch-fidelity's.
        decay: of moments that run over the updates, m <- decay m + (1 - decay) (moments of the update), which the
            image's are then taken out of; null compares the images of an update alone. The authors' script has 0.5.
        base: an .npz as `reference`, of images of the base policy, that running moments start from; by default they
            start from the first update's images, which the base policy has drawn.
    """

    name, family, scope, reads_prompt = "loo-fid", "realism", "batch", False

    def __init__(
        self,
        device: str = "cpu",
        *,
        features: Literal["inception", "nano"] = "inception",
        reference: File = None,
        weights: File = None,
        decay: Annotated[float, Ge(0), Lt(1)] | None = None,
        base: File = None,
    ):
        if features == "nano" and reference is None:
            from argrpo_cli.nano.judge import reference_moments

            self.mean, self.deviation = reference_moments()
        else:
            self.mean, self.deviation = read_moments(reference_file(reference))
        self.features, self.decay = Features(features, device, weights), decay
        self.running: Moments | None = None
        if base is not None:
            mean, deviation = read_moments(Path(base))
            if len(mean) != len(self.mean):
                raise UserError(f"{base}: mu has {len(mean)} numbers, and that of the reference {len(self.mean)}")
            mean = mean - self.mean
            self.running = Moments(mean, deviation.square() + mean.square())

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """UserError also for a file that is not there, and for a start of moments that do not run."""
        super().check_options(options)
        if options.get("base") is not None and options.get("decay") is None:
            raise UserError("reward loo-fid: base is where running moments start, and there are none; set decay, too")
        for key in ("reference", "base", "weights"):
            if (file := options.get(key)) not in (None, ADM_NAME) and not Path(file).is_file():
                raise UserError(f"reward loo-fid: no file {file}; give {key} as a path")

    @classmethod
    def needs(cls, options: Mapping[str, Any], device: str = "cpu") -> Needs:
        """Inception and a reference; the nano world's are bundled."""
        kind = options.get("features", "inception")
        needs = Features.needs(kind, options)
        if kind == "nano" or options.get("reference") not in (None, ADM_NAME) or adm_file().is_file():
            return needs
        return needs._replace(missing=f"options.reference, or {adm_file()}, which `argrpo eval imagenet` fetches")

    def look(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Features float32 [B, D]."""
        features = self.features(images)
        if features.shape[1] != len(self.mean):
            raise UserError(
                f"reward loo-fid: the reference has {len(self.mean)} numbers, and {self.features.kind} features "
                f"{features.shape[1]}; give a reference of the same features"
            )
        return features

    def compare(self, seen: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Float32 [N]; NaN for a single image."""
        x = seen.double() - self.mean
        running = self.running
        if self.decay is not None and running is None:
            running, _ = with_and_without(x)
        return leave_one_out(x, self.deviation, running, self.decay or 0.0).float()

    def advance(self, seen: Tensor) -> None:
        """m <- decay m + (1 - decay) (moments of the update)."""
        if self.decay is not None:
            whole, _ = with_and_without(seen.double() - self.mean)
            self.running = whole if self.running is None else self.running.mixed(whole, 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The running moments."""
        return {} if self.running is None else self.running._asdict()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these."""
        self.running = Moments(**state)


def adm_file() -> Path:
    """Where `argrpo eval imagenet` puts ADM's reference batch."""
    return user_cache() / ADM_URL.rpartition("/")[2]


def reference_file(given: File) -> Path:
    """The file behind the option `reference`."""
    if given not in (None, ADM_NAME):
        return Path(given)
    if not adm_file().is_file():
        raise UserError(
            f"reward loo-fid: ADM's reference is not at {adm_file()}; `argrpo eval imagenet` fetches it, or give "
            "another as options.reference"
        )
    return adm_file()


def read_moments(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation float64 [D] of an .npz with `mu` [D] and `sigma` [D, D] or `sigma_diagonal` [D].

    Raises:
        UserError: it cannot be read or has others.
    """
    import numpy as np
    import torch

    from argrpo_cli.system.npz import Npz

    file = Npz(path)
    key = next((one for one in ("sigma_diagonal", "sigma") if one in file.keys), None)
    if "mu" not in file.keys or key is None:
        raise UserError(f"{path} holds {file.content}; expected mu, and sigma or sigma_diagonal")
    mean, variance = file.numbers(("mu", key), WIDEST)
    if mean.ndim != 1 or variance.shape not in (mean.shape, mean.shape * 2):
        raise UserError(f"{path}: mu and {key} have the shapes {list(mean.shape)}, {list(variance.shape)}")
    variance = np.diag(variance) if variance.ndim == 2 else variance
    if not (np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all()):
        raise UserError(f"{path}: mu and {key} are no finite numbers, or a variance is below 0")
    return torch.from_numpy(mean), torch.from_numpy(variance.copy()).sqrt()
