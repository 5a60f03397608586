"""Somebody with a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
HOSTILE = 'the loss <script>document.title="owned"</script> is "not" finite & \'done\''
DESKTOP, PHONE = (1280, 800), (360, 740)


class Reader:
    """Opens pages, and hears what the browser says of them."""

    def __init__(self, driver: Any):
        self.driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def open(
        self, url: str | Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False, scripts: bool = True
    ) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.media("", dark=dark)
        self.cdp("Emulation.setDeviceMetricsOverride", metrics)
        self.cdp("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        self.driver.get("about:blank")
        self.driver.get_log("browser"), self.driver.get_log("performance")  # of the page before
        self.driver.get(url if isinstance(url, str) else (url / "report.html").as_uri())

    def media(self, kind: str, *, dark: bool = False) -> None:
        """Screen or paper; and nothing glides, so that what is scrolled to is there at once."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.cdp("Emulation.setEmulatedMedia", {"media": kind, "features": [scheme, still]})

    def cdp(self, command: str, values: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(command, values)

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def complaints(self) -> list[str]:
        """Everything that the console says."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked_for(self) -> list[str]:
        """The address of everything that was asked for, what the page itself holds left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]
