"""Methods by name."""

from __future__ import annotations

import pytest

from distprune.errors import InputError
from distprune.methods import METHODS, make_method
from distprune.methods.olica import Olica


def test_a_method_is_made_with_the_given_options_and_its_own_defaults():
    method = make_method("olica", {"k": 2.0})
    assert type(method) is METHODS["olica"] is Olica
    assert (method.k, method.percdamp) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("olivia", {}, "method 'olivia' does not exist.*olica"),
        ("olica", {"damping": 1}, "option 'damping' of method olica.*percdamp"),
        ("olica", {"k": -1}, "option 'k' of method olica.*greater than or equal to 0"),
        ("olica", {"calibrated_layers": "many"}, "option 'calibrated_layers' of method olica.*integer"),
    ],
)
def test_a_wrong_name_or_option_is_named_together_with_what_there_is(name, options, message):
    with pytest.raises(InputError, match=message):
        make_method(name, options)
