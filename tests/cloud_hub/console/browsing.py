"""What tests in a real browser share: how it starts, what it may complain about, readability."""

import re
from collections.abc import Iterator

from playwright.sync_api import BrowserContext, Page, expect

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 20_000  # the longest anything may take on a busy machine; nothing waits this long

# Every visible text against the surface below it, as WCAG computes contrast.
POOR_CONTRAST = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return { luminance: .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b), a };
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.a === 1) return color.luminance;
    }
    return 1;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = [];
  let seen = 0;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const [low, high] = [parse(style.color).luminance, ground(element)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    seen += 1;
    if (ratio < 4.5) poor.push(`${texts.currentNode.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return { seen, poor };
}"""

# Shapes carry meaning too: 3 to 1 against the card they lie on.
POOR_SHAPES = """() => {
  const probe = document.createElement("i");
  document.body.append(probe);
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = (token) => {
    probe.style.color = `var(${token})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
    return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  };
  const surface = luminance("--surface");
  return ["--edge", "--hub", "--degraded", "--good", "--bad"].filter((token) => {
    const [low, high] = [luminance(token), surface].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 3;
  });
}"""


def watched(context: BrowserContext) -> Iterator[BrowserContext]:
    context.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    complaints: list[str] = []
    elsewhere: list[str] = []

    def listen(page: Page) -> None:
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))

    context.on("page", listen)
    context.on(
        "request",
        lambda request: (
            None
            if re.match(r"(https?|wss?)://127\.0\.0\.1:", request.url)
            else elsewhere.append(request.url)
        ),
    )
    yield context
    context.close()
    assert elsewhere == []
    # A hub that is gone, or going, makes the browser itself complain about the lost connection.
    lost = "WebSocket connection to "
    assert [text for text in complaints if not text.startswith(lost)] == []
