"""How long a page takes to open: `python tests/browser/load.py report.html`. Median of five, from navigation
to the load event.

Not a test: the figure is for the record.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from selenium import webdriver

LOADED = (
    "const t = performance.timing; return [t.domContentLoadedEventEnd - t.navigationStart, "
    "t.loadEventEnd - t.navigationStart]"
)


def main() -> None:
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    for name in sys.argv[1:]:
        path, seen = Path(name).resolve(), []
        for _ in range(5):
            driver.get("about:blank")
            driver.get(path.as_uri())
            seen.append(driver.execute_script(LOADED))
        runs = driver.execute_script("return document.querySelectorAll('#runs-table tbody tr').length")
        parsed, loaded = (statistics.median(s[i] for s in seen) for i in (0, 1))
        size = path.stat().st_size / 1e6
        print(
            f"{name}: {runs} runs, {size:.1f} MB: parsed in {parsed:.0f} ms, loaded in {loaded:.0f} ms "
            f"(median of 5)"
        )
    driver.quit()


if __name__ == "__main__":
    main()
