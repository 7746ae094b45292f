"""The search page in a real browser: what a user does with it, and what goes wrong around it.

Needs Playwright and the distribution's Chromium.
"""

import base64
import io
import json
import os
import re
import shutil
import time

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("lancedb")
pytest.importorskip("playwright")

from playwright import sync_api

from llave_jax.search.columns import Row
from llave_jax.search.index import Index
from llave_jax.serving import process
from llave_jax.serving.app import App, Model
from llave_jax.serving.batcher import Batcher, QueueFull
from llave_jax.serving.guard import Keys
from llave_jax.serving.items import ClientItem
from tests.serving.fake_engine import DIMENSION, LONGEST, FakeEngine, vector_of
from tests.serving.in_process import SMALL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
expect = sync_api.expect
MARKUP = "<img src=x onerror=alert(1)><b>bold</b>"
TEXTS = 5
PHOTOS = 40


def encoded(size, color, kind="jpeg"):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def rows():
    for n in range(PHOTOS):
        size = (24, 24) if n < 3 else [(256, 144), (120, 256), (200, 200)][n % 3]
        metadata = {"label": "odd" if n % 2 else "even", "weight": n / 4, "new": n > 5}
        yield Row(
            id=f"photos/{n} a?#%.jpg",
            kind="image",
            path=f"/secret/photo {n}.jpg",
            metadata=metadata,
            thumbnail=encoded(size, (6 * n, 90, 90)),
        )
    for n in range(TEXTS):
        text = MARKUP if n == 0 else f"Passage {n}. " + "Glaciers slide over their bed. " * 20
        yield Row(
            id=f"text {n}", kind="text", text=text, metadata={"label": "even" if n else MARKUP}
        )
    yield Row(id="video", kind="video", path="/v.mp4", thumbnail=encoded((256, 144), "navy"))
    yield Row(id="mixed", kind="mixed", text="A sign?", thumbnail=encoded((99, 150), "olive"))
    yield Row(id="bare", kind="image", path="/bare.tiff")


class Site:
    """A server with an engine without a model."""

    def __init__(self, index=None, keys=(), limits=SMALL):
        self.index, self.limits, self.keys = index, limits, keys
        self.engine = FakeEngine(limits=limits)
        self.port = 0
        self.http = None
        self.start()

    def start(self):
        self.app = App(self.limits, Keys(self.keys))
        self.batcher = Batcher(
            self.engine, max_waiting=self.limits.waiting, observer=self.app.metrics
        )
        listening = process.listen("127.0.0.1", self.port)
        self.port = listening.getsockname()[1]
        self.http = process.HttpServer(self.app.asgi, listening, self.limits, 1.0)
        self.url = self.http.url
        self.app.start(Model("tiny", DIMENSION, LONGEST, ["query"]), self.batcher, self.index)

    def stop(self):
        self.http.stop(2.0)
        self.batcher.close(0.0)


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """sites(...) -> a `Site`; all of them end with the module."""
    made = []

    def make(*arguments, **options):
        made.append(Site(*arguments, **options))
        return made[-1]

    yield make
    for site in made:
        site.stop()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "photos.lance"
    all_rows = list(rows())
    with Index.create(path, DIMENSION, model={"fingerprint": "x"}) as made:
        made.add(all_rows, np.stack([vector_of(row.id) for row in all_rows]))
    with Index.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def site(sites, index):
    return sites(index)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """visit(site, after="", expected=()) -> a page that is open.

    What the console says, failed requests whose status or error is not `expected`, requests to another host and
    dialogs of a script fail the test at its end.
    """
    contexts, wrong = [], []

    def visit(site, after="", expected=(), width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def said(message):
            # Those of requests have no address here; they are below.
            if message.type in ("error", "warning") and "Failed to load" not in message.text:
                wrong.append(message.text)

        def answered(response):
            missing = response.url.endswith("/items/bare/thumbnail")
            if response.status >= 400 and response.status not in expected and not missing:
                wrong.append(f"{response.status} {response.url}")

        def failed(request):
            if request.failure not in ("net::ERR_ABORTED", *expected):
                wrong.append(f"{request.failure} {request.url}")

        def asked(request):
            if not request.url.startswith((site.url + "/", "blob:", "data:")):
                wrong.append(f"to another host: {request.url}")

        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        context.on("request", asked)
        context.on("requestfailed", failed)
        context.on("response", answered)
        page.goto(f"{site.url}/{after}")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def cards(page):
    return page.locator("#results > li")


def search(page, text):
    page.fill("#text", text)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("result")


def sent(page, action):
    """The body of the search that an action sends."""
    with page.expect_request("**/search") as caught:
        action()
    return json.loads(caught.value.post_data)


def picture_of(body):
    head, _, content = body["image"].partition(",")
    return head, base64.b64decode(content)


# Files as the clipboard and a drag from the desktop bring them.
GIVE = """([type, name, kind, content]) => {
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  if (name) transfer.items.add(new File([bytes], name, {type: kind}));
  const options = {bubbles: true, cancelable: true};
  const event = type === "paste"
    ? new ClipboardEvent(type, {...options, clipboardData: transfer})
    : new DragEvent(type, {...options, dataTransfer: transfer});
  document.body.dispatchEvent(event);
}"""


def give(page, type, content, name="query.png", kind="image/png"):
    page.evaluate(GIVE, [type, name, kind, base64.b64encode(content).decode()])


def test_it_begins_with_items_of_the_index(site, visit):
    page = visit(site)
    expect(cards(page)).to_have_count(40)
    expect(page.locator("#facts")).to_have_text("41 images, 5 texts, 1 video, 1 mixed · tiny")
    assert page.evaluate("document.activeElement.id") == "text"
    assert site.engine.prepared == []


def test_a_search_by_text_and_what_is_shown_of_it(site, visit):
    page = visit(site)
    search(page, "a cat")
    expect(cards(page)).to_have_count(40)
    assert site.engine.prepared[-1] == "query a cat []"
    scores = [float(text) for text in page.locator(".score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    page.click("#more")
    expect(cards(page)).to_have_count(PHOTOS + TEXTS + 3)
    expect(page.locator("#more")).to_be_hidden()
    # Text is text, whatever is in it.
    text = page.locator('li[data-kind="text"]', has_text="onerror").first
    expect(text.locator("span.words")).to_have_text(MARKUP)
    assert page.locator("#results b, #results img[src=x]").count() == 0
    expect(page.locator('li[data-kind="video"] .badge')).to_have_text("video")
    expect(page.locator("li", has_text="bare.tiff").locator("span.words")).to_contain_text(
        "no picture"
    )
    # Pictures keep their ratio; scans of a few pixels are shown in whole multiples.
    card = page.locator("li", has_text="photo 3.jpg")
    expect(card).to_have_attribute("style", re.compile("--ratio"))
    wide = card.locator("img").bounding_box()
    assert wide["width"] / wide["height"] == pytest.approx(256 / 144, rel=0.02)
    card = page.locator("li", has_text="photo 1.jpg")
    expect(card).to_have_class("tiny")
    tiny = card.locator("img")
    assert tiny.bounding_box()["width"] == 120
    assert tiny.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_images_are_dropped_pasted_and_chosen(site, visit, tmp_path):
    page = visit(site)
    small = encoded((20, 10), "red", "png")
    body = sent(page, lambda: give(page, "drop", small))
    assert picture_of(body) == ("data:image/png;base64", small)
    expect(page.locator("#subject span")).to_have_text("query.png")
    expect(page.locator("#status")).to_contain_text("40 results")

    # Words beside the image.
    body = sent(page, lambda: search(page, "at night"))
    assert body["text"] == "at night"
    assert picture_of(body)[1] == small

    # Beyond the limits of the server it is made smaller; its ratio stays.
    noise = np.random.default_rng(0).integers(0, 255, (600, 1200, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, "png")
    body = sent(page, lambda: give(page, "paste", buffer.getvalue()))
    kind, content = picture_of(body)
    width, height = PIL.Image.open(io.BytesIO(content)).size
    assert kind == "data:image/jpeg;base64"
    assert width * height <= SMALL.pixels
    assert width / height == pytest.approx(2, rel=0.03)
    expect(page.locator("#status")).to_contain_text("40 results")

    file = tmp_path / "mine.webp"
    file.write_bytes(encoded((30, 30), "blue", "webp"))
    body = sent(page, lambda: page.set_input_files("#file", file))
    assert picture_of(body)[1] == file.read_bytes()
    expect(page.locator("#subject span")).to_have_text("mine.webp")
    page.click("#subject button")
    expect(page.locator("#subject")).to_be_hidden()
    assert "image" not in page.url


def test_files_that_are_no_images(site, visit):
    page = visit(site)
    expect(cards(page)).to_have_count(40)
    give(page, "drop", b"nonsense", name="broken.png")
    expect(page.locator("#notice")).to_contain_text("broken.png is no image")
    give(page, "drop", b"", name="")
    expect(page.locator("#notice")).to_contain_text("fetches nothing from other sites")
    expect(cards(page)).to_have_count(40)
    search(page, "a cat")
    expect(page.locator("#notice")).to_be_hidden()


def test_a_query_that_the_server_refuses(site, visit):
    page = visit(site, expected=[400])
    page.fill("#text", "long " * LONGEST)
    page.keyboard.press("Enter")
    expect(page.locator("#notice h2")).to_have_text("The server cannot use that")
    expect(page.locator("#notice p")).to_contain_text("is too long")
    expect(page.locator("#notice button")).to_have_text("Try again")


def test_filters(site, visit):
    page = visit(site)
    search(page, "a cat")
    group = lambda name: page.locator(f'fieldset[data-column="{name}"]')  # noqa: E731
    assert page.locator("fieldset legend").all_text_contents() == [
        "kind", "text", "label", "weight", "new",
    ]  # fmt: skip
    body = sent(page, lambda: group("label").get_by_text("odd").click())
    assert body["where"] == {"label": ["odd"]}
    expect(page.locator("#status")).to_contain_text("20 results")
    body = sent(page, lambda: group("new").get_by_text("yes").click())
    assert body["where"] == {"label": ["odd"], "new": [True]}
    expect(page.locator("#status")).to_contain_text("17 results")
    group("weight").get_by_label("to").fill("3")
    body = sent(page, lambda: page.keyboard.press("Enter"))
    assert body["where"]["weight"] == {"lte": 3}
    expect(page.locator("#status")).to_contain_text("3 results")
    # Filters are part of the link.
    again = visit(site, page.url.removeprefix(site.url + "/"))
    expect(again.locator("#status")).to_contain_text("3 results")
    expect(again.locator('.chip[aria-pressed="true"]')).to_have_text(["odd", "yes"])
    group("text").get_by_label("contains").fill("nowhere")
    page.keyboard.press("Enter")
    expect(page.locator("#notice h2")).to_have_text("Nothing passes these filters")
    page.click("#notice button")
    expect(page.locator("#status")).to_contain_text("40 results")
    group("kind").get_by_text("text").click()
    expect(page.locator("#results.texts > li")).to_have_count(TEXTS)


def test_more_like_this_and_back(site, visit):
    page = visit(site)
    search(page, "a cat")
    first = page.locator(".open").first.get_attribute("aria-label")
    give(page, "drop", encoded((20, 10), "red", "png"))
    expect(page.locator("#subject span")).to_have_text("query.png")
    cards(page).filter(has_text="photo 7.jpg").locator(".like").click()
    expect(page.locator("#subject span")).to_have_text("like photo 7.jpg")
    expect(page.locator("#text")).to_have_value("")
    # Not the item itself.
    expect(cards(page).filter(has_text="photo 7.jpg")).to_have_count(0)
    expect(cards(page)).to_have_count(40)
    like = page.url
    page.go_back()
    expect(page.locator("#subject span")).to_have_text("query.png")
    page.go_back()
    expect(page.locator("#subject")).to_be_hidden()
    expect(page.locator("#text")).to_have_value("a cat")
    expect(page.locator(".open").first).to_have_attribute("aria-label", first)
    # The link alone finds it too; a link to a search by an image says that it has none.
    other = visit(site, like.removeprefix(site.url + "/"), expected=[404])
    expect(other.locator("#subject span")).to_have_text("like photo 7.jpg")
    expect(other.locator("#subject img")).to_be_visible()
    other.goto(f"{site.url}/#image=1")
    expect(other.locator("#notice")).to_contain_text("A link does not hold images")
    other.goto(f"{site.url}/#like=nothing")
    expect(other.locator("#notice")).to_contain_text("no longer in the index")


def test_the_view_of_a_result_and_keys(site, visit):
    page = visit(site)
    search(page, "a cat")
    label = lambda place: page.locator(".open").nth(place).get_attribute("aria-label")  # noqa: E731
    focused = lambda: page.evaluate("document.activeElement.ariaLabel")  # noqa: E731
    page.keyboard.press("ArrowDown")
    assert focused() == label(0)
    page.keyboard.press("ArrowRight")
    assert focused() == label(1)
    page.keyboard.press("ArrowDown")
    boxes = [cards(page).nth(n).bounding_box() for n in range(12)]
    second_row = [n for n, box in enumerate(boxes) if box["y"] > boxes[0]["y"] + 1]
    assert focused() in [label(n) for n in second_row]
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    detail = page.locator("#detail")
    expect(detail).to_be_visible()
    title = detail.locator("h2").text_content()
    page.keyboard.press("ArrowRight")
    expect(detail.locator("h2")).not_to_have_text(title)
    assert "cosine" not in detail.text_content()
    assert "score" in detail.text_content()
    page.keyboard.press("Escape")
    expect(page.locator(".open").nth(1)).to_be_focused()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("m")
    expect(page.locator("#subject")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#subject")).to_be_hidden()
    # Text in the view is text as well.
    page.locator('fieldset[data-column="kind"]').get_by_text("text").click()
    cards(page).filter(has_text="onerror").locator(".open").click()
    expect(detail.locator(".text")).to_have_text(MARKUP)
    expect(detail.locator("dd").first).to_have_text(MARKUP)


def test_servers_without_items(sites, visit, tmp_path):
    page = visit(sites(), expected=[404])
    expect(page.locator("#notice h2")).to_have_text("This server has no index to search")
    expect(page.locator("#notice pre")).to_contain_text("llave_jax.index build")
    with Index.create(tmp_path / "empty.lance", DIMENSION, model={"fingerprint": "x"}) as empty:
        page = visit(sites(empty))
        expect(page.locator("#notice h2")).to_have_text("The index is empty")
        page.keyboard.press("/")
        search_text = page.locator("#text")
        search_text.fill("a cat")
        page.keyboard.press("Enter")
        expect(page.locator("#notice h2")).to_have_text("The index is empty")
        # Items that are added are seen.
        empty.add([next(rows())], vector_of("x")[None])
        page.click("#notice button")
        expect(page.locator("#status")).to_contain_text("1 result")


def test_a_server_that_goes_and_comes_back(sites, index, visit):
    site = sites(index)
    page = visit(site, expected=["net::ERR_CONNECTION_REFUSED"])
    search(page, "a cat")
    # The clock stands still: what is asked again is asked because of the button.
    page.clock.install()
    page.clock.pause_at(time.time() + 3600)
    site.stop()
    page.fill("#text", "a dog")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("The server does not answer")
    expect(page.locator("#notice")).to_contain_text("Trying again in 2 s")
    site.start()
    with page.expect_response("**/search") as answered:
        page.click("#notice button")
    assert answered.value.ok
    expect(page.locator("#notice")).to_be_hidden()
    assert "query a dog []" in site.engine.prepared


def test_a_full_queue(sites, index, visit):
    site = sites(index)
    page = visit(site, expected=[429])
    expect(cards(page)).to_have_count(40)
    site.engine.gate.clear()
    refused = 0
    while refused < 5:  # what waits goes on to be prepared, until there is no room for that either
        try:
            site.batcher.submit([ClientItem("other")], lambda: None, stop=False)
            refused = 0
        except QueueFull:
            refused += 1
            time.sleep(0.05)
    page.fill("#text", "a cat")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("The server is busy")
    site.engine.gate.set()
    # It tries again by itself.
    expect(page.locator("#status")).to_contain_text("40 results", timeout=15_000)
    expect(page.locator("#notice")).to_be_hidden()


def test_an_api_key(sites, index, visit):
    page = visit(sites(index, keys=["right"]), expected=[401])
    dialog = page.locator("#key")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#notice h2")).to_have_text("No API key")
    page.click("#notice button")
    dialog.locator("input").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.locator(".wrong")).to_be_visible()
    dialog.locator("input").fill("right")
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(40)
    expect(page.locator('#results img[src^="blob:"]').first).to_be_visible()
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [
        0, "", 1,
    ]  # fmt: skip
    page.reload()
    expect(cards(page)).to_have_count(40)
    assert "right" not in page.url


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(site, visit, width):
    page = visit(site, width=width, color_scheme="dark")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    expect(cards(page)).to_have_count(40)
    assert page.evaluate(overflow) == 0
    search(page, "a word of many letters: " + "x" * 150)
    page.click("#more")
    expect(cards(page)).to_have_count(PHOTOS + TEXTS + 3)
    if width == 390:
        page.click("#filters summary")
    assert page.evaluate(overflow) == 0
    cards(page).filter(has_text="onerror").locator(".open").click()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert page.evaluate(overflow) == 0
