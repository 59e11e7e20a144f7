"""`report.html` as a browser shows it: on a phone and on a desktop, light and dark."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from itertools import product

import pytest

from bakeout.validate.report.html import to_page

WIDTHS = (360, 1280)
SCHEMES = ("light", "dark")
WORDS = {"pass": "Pass", "fail": "Fail", "unjudged": "Could not judge"}

# Every element with text of its own whose contrast with what is behind it, as defined in WCAG 2.2, is below 4.5.
CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const back = rgb(view.getComputedStyle(node).backgroundColor);
      if (back.length < 4 || back[3] > 0) return back;
    }
  };
  const low = [];
  for (const node of page.body.querySelectorAll('*')) {
    if (![...node.childNodes].some(it => it.nodeType === 3 && it.data.trim())) continue;
    const style = view.getComputedStyle(node);
    const [a, b] = [light(rgb(node.matches('svg *') ? style.fill : style.color)), light(behind(node))];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) low.push([node.textContent.slice(0, 40), contrast]);
  }
  return low;
})()"""
OVERLAPS = """[...page.querySelectorAll('.panels svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  const out = boxes.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1).map(([text]) => [text, 'the edge']);
  const both = boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) => a.left < b.right && b.left < a.right
    && a.top + 2 < b.bottom && b.top + 2 < a.bottom).map(([other]) => [one, other]));
  return [...out, ...both];
})"""
SEEN = f"""(() => {{
  const banner = page.querySelector('.banner').getBoundingClientRect();
  const wide = () => [page.documentElement.scrollWidth, page.body.scrollWidth];
  const closed = wide();
  const contrast = {CONTRAST}, overlaps = {OVERLAPS};
  page.querySelectorAll('details').forEach(it => it.open = true);
  return {{
    closed, open: wide(), contrast, overlaps, opened: {CONTRAST}, banner: [banner.top, banner.bottom],
    dark: view.matchMedia('(prefers-color-scheme: dark)').matches, width: view.innerWidth,
    text: page.querySelector('.banner').innerText, title: page.title,
    scripts: page.scripts.length, handlers: page.querySelectorAll('[onerror], [onload], [onclick]').length,
    broken: [...page.images].filter(it => !it.complete || !it.naturalWidth).length, images: page.images.length,
    small: Math.min(...[...page.querySelectorAll('.panels svg text')].map(it => it.getBoundingClientRect().height)),
  }};
}})()"""


@pytest.fixture(scope="module")
def page(samples):
    return lambda name: to_page(*samples(name))


@pytest.fixture(scope="module")
def looks(browser, view, page):
    """Every sample as it is seen at every width and in every scheme, all in one run of the browser."""
    asked = list(product(WORDS, WIDTHS, SCHEMES))
    views = [view(page(name), width, scheme) for name, width, scheme in asked]
    return dict(zip(asked, browser.measure(views, SEEN), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", WORDS)
def test_the_page_can_be_read(looks, name, width, scheme):
    seen = looks[name, width, scheme]
    assert (seen["width"], seen["dark"]) == (width, scheme == "dark")
    assert WORDS[name] in seen["text"]
    assert seen["title"].startswith(WORDS[name])
    assert 0 <= seen["banner"][0] < seen["banner"][1] < 400
    assert max(*seen["closed"], *seen["open"]) <= width
    assert not seen["contrast"]
    assert not seen["opened"]
    assert not seen["overlaps"]
    assert seen["small"] >= 12
    assert (seen["scripts"], seen["handlers"], seen["broken"]) == (0, 0, 0)
    assert seen["images"] >= 18


def test_the_first_screen_shows_the_verdict_in_its_colour(browser, view, page):
    asked = list(product(("pass", "fail"), WIDTHS, SCHEMES))
    pictures = browser.pictures([view(page(name), width, scheme) for name, width, scheme in asked])
    for (name, width, scheme), picture in zip(asked, pictures, strict=True):
        assert len(picture.getcolors(maxcolors=2**20)) > 100
        darkest, brightest = picture.convert("L").getextrema()
        assert brightest - darkest > 150
        middle = sorted(picture.convert("L").resize((32, 32)).tobytes())[512]
        assert (middle < 80) == (scheme == "dark")
        # The left edge of the banner is a bar of the verdict's colour.
        bar = [picture.getpixel((x, y)) for y in range(40, 200, 4) for x in range(width // 8)]
        red, green = max(r - g for r, g, _ in bar), max(g - r for r, g, _ in bar)
        assert (green > 50 > red) if name == "pass" else (red > 50 > green)


def test_what_cannot_be_read_is_seen(browser, view, page):
    made = page("pass").replace("<main>", "<main><font color='#aaaaaa'>pale</font><img width=700 alt=''>", 1)
    made = made.replace(">relative RMS</text>", ">relative RMS</text><text x=0 y=12>over it</text>", 1)
    (seen,) = browser.measure([view(made, 360, "light")], SEEN)
    assert max(seen["closed"]) > 360
    assert [text for text, _ in seen["contrast"]] == ["pale"]
    assert seen["overlaps"] == [["relative RMS", "over it"]]


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address, and what was asked of it."""
    asked: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline().decode())
            self.wfile.write(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", asked
        listening.shutdown()


def test_no_request_leaves_the_page_even_if_markup_got_in(browser, view, page, server):
    address, asked = server
    injected = (
        f"<main><img src='{address}/picture'><script src='{address}/script'></script>"
        f"<link rel=stylesheet href='{address}/style'><iframe src='{address}/frame'></iframe>"
        f"<script>new Image().src = '{address}/inline'</script>"
    )
    guarded = page("fail").replace("<main>", injected, 1)
    browser.measure([view(guarded, 1280, "light")], "0")
    # The browser may connect ahead of a request that it then does not make.
    assert not any(asked)

    policy = guarded[guarded.index("<meta http-equiv") : guarded.index('<meta name="viewport"')]
    browser.measure([view(guarded.replace(policy, ""), 1280, "light")], "0")
    assert {line.split()[1] for line in asked if line} >= {"/picture", "/script", "/style", "/frame", "/inline"}
