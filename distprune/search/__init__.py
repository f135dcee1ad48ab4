"""Plans refined by measurement: what the parts of layers may become, what that was measured to cost, and the choice."""

from distprune.search.part_options import STEPS, LayerPart, PartOptions, library_options
from distprune.search.prices import Change, changed_choices, corrected_prices, part_of_the_way
from distprune.search.searched_plan import affordable_choices, plan_of_parts, searched_plan, shapes_of

__all__ = [
    "STEPS",
    "Change",
    "LayerPart",
    "PartOptions",
    "affordable_choices",
    "changed_choices",
    "corrected_prices",
    "library_options",
    "part_of_the_way",
    "plan_of_parts",
    "searched_plan",
    "shapes_of",
]
