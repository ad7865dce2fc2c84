"The health of a deployed model: its page in a real browser, and an estimate whose stated error holds on a real model."

import httpx
import numpy as np
import pytest
from programs import chromium, violations
from serving import encoded, running, tiny_model

from celestial_ml.core.testing import raises
from celestial_ml.data.corruptions import CORRUPTIONS, corrupt
from celestial_ml.label.live_labels import audit_log
from celestial_ml.model.estimates import SHIFTS, HeldOut, estimate_accuracy, shifted_estimates
from celestial_ml.planets.renderer import render, render_many
from celestial_ml.serve.settings import password_hash

SERVE = (
    "from celestial_ml.monitor.log import open_log; from celestial_ml.reports.health import add_whole_demo;"
    "from celestial_ml.serve.server import serve; log = open_log(); serve({model!r}, port=0, demo=add_whole_demo, log=log);"
    "log.close()"
)
SIZES = {"desk": ({"width": 1280, "height": 900}, "dark"), "phone": ({"width": 390, "height": 844}, "light")}


def opened(browser, url, size, login=False):
    "The page Health, and what the browser complains of."
    viewport, scheme = SIZES[size]
    page, complaints = browser.new_page(viewport=viewport, color_scheme=scheme, reduced_motion="reduce"), []
    page.set_default_timeout(60_000)
    page.on("console", lambda one: complaints.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda one: complaints.append(str(one)))
    page.goto(url)
    if login:
        page.get_by_label("username").fill("anna")
        page.get_by_label("password").fill("per aspera")
        assert page.locator("#health").count() == 0, "not for strangers"
        page.get_by_role("button", name="Login").click()
    page.get_by_role("tab", name="Health").click()
    page.locator("#health .lamp").wait_for()
    return page, complaints


@pytest.mark.browser
def test_the_page_follows_the_service(tmp_path):
    "Behind a login; empty at first, then with figures, without being loaded again; in order for axe-core, without pictures."
    serve, login = SERVE.format(model=str(tiny_model(tmp_path / "model"))), f"anna:{password_hash('per aspera')}"
    with chromium() as browser, running(None, tmp_path / "log", serve=serve, demo_login=login) as url:
        assert httpx.get(f"{url}/config").status_code == 401 == httpx.post(f"{url}/gradio_api/queue/join").status_code
        page, complaints = opened(browser, url, "desk", login=True)
        assert page.locator("#health .lamp.nothing").count() == 1 and violations(page) == []
        with httpx.Client(base_url=url, timeout=60) as client:
            for i in range(12):
                picture = encoded(render("Mars" if i % 3 else "Neptune", size=64 + i))
                answer = client.post("/predict", files={"image": picture}).json()
                wrong = {"correct": False, "label": "Pluto"} if i % 4 == 0 else {"correct": True}
                client.post("/feedback", json={"request_id": answer["request_id"]} | wrong).raise_for_status()
        page.locator("#health .lamp.well").wait_for()
        page.locator("#health .slices").wait_for()
        assert page.locator("#health svg.trend").count() >= 2 and page.locator("#health img").count() == 0
        assert answer["request_id"] not in page.content() and violations(page) == [] == complaints
        for size in SIZES:
            page, complaints = opened(browser, url, size, login=True)
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") == 0, size
            assert violations(page) == [] == complaints, size


def test_an_audit_needs_pictures_of_sure_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("CELESTIAL_HOME", str(tmp_path / "home"))
    with raises():
        next(audit_log(5))


def test_the_stated_error_covers_the_truth():
    "A classifier of rendered bodies, on changes that its evaluation didn't try: the interval holds the known answers' accuracy."
    from sklearn.linear_model import LogisticRegression

    rng, bodies = np.random.default_rng(0), ("Mars", "Moon", "Neptune", "Venus", "Jupiter")
    drawn = [(bodies.index(name), image) for name, _, _, image in render_many(60, 32, bodies=bodies)]
    labels, images = np.array([place for place, _ in drawn]), [image for _, image in drawn]

    def features(pictures):
        return np.stack([one.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).ravel() / 255 for one in pictures])

    learned, held, later = np.split(rng.permutation(300), (150, 230))
    x = features(images)
    model = LogisticRegression(C=0.05, max_iter=500).fit(x[learned], labels[learned])
    distance = lambda seen: np.abs(seen[:, None] - x[learned]).mean(axis=2).min(axis=1)  # noqa: E731
    limit = 1.5 * np.quantile(distance(x[held]), 0.98)

    def answer(pictures):
        seen = features(pictures)
        return model.predict_proba(seen), distance(seen) > limit

    probabilities = model.predict_proba(x[held])
    held_out = HeldOut(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels[held])
    shifts = shifted_estimates(answer, [images[i] for i in held[:40]], labels[held[:40]], held_out)
    covered, widths = [], []
    for name in sorted(set(CORRUPTIONS) - set(SHIFTS)):
        for degree in (2, 4):
            probabilities, unknown = answer([corrupt(images[i], name, degree, (3, int(i))) for i in later])
            known, right = ~unknown, probabilities.argmax(axis=1) == labels[later]
            for one in estimate_accuracy(probabilities[known].max(axis=1), unknown.mean(), held_out, shifts):
                if one.value is not None and known.sum() >= 10:
                    covered.append(one.low <= right[known].mean() <= one.high)
                    widths.append(one.high - one.low)
    print(f"{np.mean(covered):.1%} of {len(covered)} estimates; median width {np.median(widths):.2f}")
    assert len(covered) >= 20 and np.mean(covered) >= 0.9 and np.median(widths) < 0.75
