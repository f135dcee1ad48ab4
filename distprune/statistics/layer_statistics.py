"""What was collected for one decoder layer while calibration hidden states ran through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from distprune.layers.sites import Site
from distprune.statistics.moments import (
    Activations,
    Cross,
    Gram,
    HeadGram,
    Mean,
    MeanNorm,
    Moment,
    Peak,
    Power,
    ScalingPower,
    moved,
    sites_of,
)


class LayerStatistics:
    """Running totals of the asked-for moments, in float32; nothing else is computed or kept.

    Every site counts its own tokens: an expert sees only those that were routed to it. Each moment is held once: it
    becomes its average in place when it is first read, and after that nothing can be added. What is read must not be
    changed. Asking for what was not collected is a mistake in the method and raises ``KeyError``, and so does a moment
    of a site that the layer does not have.

    Args:
        moments: what to collect.
        device: where totals are kept; by default where the activations are.
    """

    def __init__(self, moments: Iterable[Moment], device: torch.device | None = None):
        self._totals: dict[Moment, Tensor | None] = dict.fromkeys(moments)
        self._averages: dict[Moment, Tensor] = {}
        self._tokens = dict.fromkeys(sites_of(self._totals), 0)
        self._device = device

    def update(self, activations: Activations) -> None:
        """Add one micro-batch of activations, each (tokens, width); the tokens may differ from site to site.

        Raises:
            RuntimeError: a moment has been read.
        """
        if self._averages:
            raise RuntimeError("statistics that have been read can't be added to")
        for moment, total in self._totals.items():
            if total is None:
                total = self._totals[moment] = zeros(moment, activations, self._device)
            if len(activations[moment.site]):
                moment.add(total, activations)
        for site in self._tokens:
            self._tokens[site] += len(activations[site])

    @classmethod
    def together(cls, statistics: Iterable[LayerStatistics]) -> LayerStatistics:
        """What several have seen, each of other moments, and no longer hold."""
        joined = cls(())
        for each in statistics:
            joined._totals |= each._totals
            joined._averages |= each._averages
            joined._tokens |= each._tokens
            each._totals, each._averages = {}, {}
        return joined

    def to_values(self, moments: Iterable[Moment]) -> dict[str, Tensor | int]:
        """The averages of some of the moments by name, and how many tokens their sites have seen."""
        averages = {moment: self._average(moment) for moment in moments}
        tokens = {counted(site): self.tokens(site) for site in sorted(sites_of(averages))}
        return {str(moment): average for moment, average in averages.items()} | tokens

    def to_tensors(self, moments: Iterable[Moment]) -> dict[str, Tensor]:
        """The same as tensors alone, to be stored."""
        return {name: torch.as_tensor(value) for name, value in self.to_values(moments).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | int], moments: Iterable[Moment]) -> LayerStatistics | None:
        """Statistics that hold just the ``moments``, of what :meth:`to_values` or :meth:`to_tensors` has given; None if
        not all of them are there."""
        names = {moment: str(moment) for moment in moments}
        if not names or not tensors.keys() >= {*names.values()}:
            return None
        statistics = cls(())
        statistics._averages = {moment: torch.as_tensor(tensors[name]) for moment, name in names.items()}
        statistics._tokens = {site: int(tensors[counted(site)]) for site in sites_of(names)}
        return statistics

    def _average(self, moment: Moment) -> Tensor:
        if moment not in self._averages:
            total = self._totals.pop(moment)
            if total is None:
                raise KeyError(f"{moment} was asked for, and no activations have been seen")
            self._averages[moment] = moment.average(total, self._tokens[moment.site])
        return self._averages[moment]

    def tokens(self, site: Site) -> int:
        """How many tokens the site has seen."""
        return self._tokens[site]

    def mean(self, site: Site) -> Tensor:
        return self._average(Mean(site))

    def power(self, site: Site) -> Tensor:
        return self._average(Power(site))

    def rms(self, site: Site) -> Tensor:
        """Root mean square of every channel, (width,)."""
        return self.power(site).sqrt()

    def mean_norm(self, site: Site) -> Tensor:
        """Mean norm of the activations, ()."""
        return self._average(MeanNorm(site))

    def peak(self, site: Site) -> Tensor:
        """Largest magnitude of every channel, (width,)."""
        return self._average(Peak(site))

    def gram(self, site: Site) -> Tensor:
        return self._average(Gram(site))

    def cross(self, site: Site, other: Site) -> Tensor:
        return self._average(Cross(site, other))

    def head_gram(self, site: Site, heads: int) -> Tensor:
        return self._average(HeadGram(site, heads))

    def scaling_power(self, site: Site, other: Site, groups: int, pairs: int) -> Tensor:
        return self._average(ScalingPower(site, other, groups, pairs))

    def moved(self, places: Mapping[Site, Site]) -> LayerStatistics:
        """The same statistics where some sites are other ones, such as those of an expert for those of a feed-forward
        network."""
        return MovedStatistics(self, places)


#: How much is added to the diagonal of a Gram matrix, over its mean, where there were as many tokens as channels. With
#: fewer it is more in proportion: what they don't tell of is taken for noise of equal power.
SCARCITY = 0.01


class MovedStatistics(LayerStatistics):
    """What was collected at other sites, of which some may have seen few tokens or none.

    Where there were none, moments are what :meth:`Moment.unseen` says.
    """

    def __init__(self, statistics: LayerStatistics, places: Mapping[Site, Site]):
        super().__init__(())
        self._statistics, self._places = statistics, places

    def tokens(self, site: Site) -> int:
        place = moved(site, self._places)
        assert isinstance(place, Site)
        return self._statistics.tokens(place)

    def _average(self, moment: Moment) -> Tensor:
        average, tokens = self._statistics._average(moment.moved(self._places)), self.tokens(moment.site)
        if not tokens:
            return moment.unseen(average)
        if isinstance(moment, Gram):
            average = average.clone()
            average.diagonal().add_(SCARCITY * len(average) / tokens * average.diagonal().mean())
        return average


def counted(site: Site) -> str:
    """What the number of a site's tokens is called among named averages."""
    return f"tokens({site})"


def zeros(moment: Moment, activations: Activations, device: torch.device | None) -> Tensor:
    """A total to begin with: an ordinary tensor, though layers run in inference mode, since it changes after that."""
    device = device or activations[moment.site].device
    with torch.inference_mode(False):
        return torch.zeros(moment.size(activations), dtype=torch.float32, device=device)
