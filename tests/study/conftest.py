import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """Studies are concluded without drawing their pictures, which takes seconds; existing ones stay."""
    monkeypatch.setattr("ebc_lab.report.pictures.draw_study", lambda root: [])
