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

    def show(self, element: Any) -> None:
        """Scroll to it at once, as a click by the mouse needs."""
        self.run("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", element)

    def unfold(self) -> None:
        """Open all details."""
        self.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")

    def violations(self, where: str = "html") -> list[str]:
        """What axe finds wrong there, each with the first element that it is about."""
        self.run(AXE.read_text())
        self.set_script_timeout(120)
        asked = "const [where, done] = arguments; axe.run(where, {resultTypes: ['violations']}).then(done)"
        found = self.driver.execute_async_script(asked, where)
        assert found["passes"]
        return [f"{v['impact']}: {v['id']}: {v['nodes'][0]['html'][:120]}" for v in found["violations"]]

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
