"""Arms in words: what the end of a name says of its schedules."""

import pytest

from ebc_lab.report.text.words import short, words

ARM = {"ebc": True, "lr_scale": 2.0, "roles": ["ebc_x2"], "track": "adam_none"}


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("", "EBC ×2"),
        ("_lindelta_lrdecay", "EBC ×2, falling δ*, LR decay"),
        ("_holddelta_trapezoid_w0", "EBC ×2, δ* held, then falling, trapezoid LR, no warm-up"),
        ("_cosine_w100", "EBC ×2, cosine LR, 100 steps of warm-up"),
    ],
)
def test_a_label_names_the_schedules(tail, said):
    assert short(f"adam_none_ebc_d0p02_shadow_x2{tail}", ARM) == said


def test_a_title_says_the_same_at_length():
    title = words("adam_none_ebc_d0p02_shadow_x2_holddelta_trapezoid_w0", ARM)
    assert title.startswith("Adam with EBC, 2× the best plain learning rate, KL target held")
    assert title.endswith("learning rate held, then falling to 0, no warm-up")
