"""The final arms side by side: who got to the baseline's loss, and when."""

from __future__ import annotations

from support.drawn import drawn, words_of, write_study


def test_efficiency_shows_who_reached_the_baselines_loss_in_all_three_units(tmp_path):
    sheet = drawn(write_study(tmp_path), until="efficiency")["efficiency"]
    told = [" ".join(text.split()) for text in words_of(sheet)]
    assert "30 steps, 0.96k tokens, 0.3 s (1 of 2 seeds)" in told
    assert sum(text.startswith("×  not reached by") or "not reached by" in text for text in told) == 2
    assert "First: EBC ×2, falling δ*, at step 30; 1 of 2 other arms get there." in sheet.alt
