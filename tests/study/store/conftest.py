import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """Studies are concluded without drawing their pictures, which takes seconds; those that are there stay."""
    monkeypatch.setattr("ebc_lab.report.pictures.draw_study", lambda root: [])
