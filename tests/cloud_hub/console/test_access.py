from collections.abc import AsyncIterator

import aiohttp
import pytest
from yarl import URL

from cloud_hub.console import access
from cloud_hub.console.access import SESSION_S, Sessions, is_loopback_name
from tests.cloud_hub.console.stage import TOKEN, Console, only_the_right_token

PAGES = ("/", "/api/v1/overview", "/api/v1/live", "/login")


@pytest.fixture
async def console() -> AsyncIterator[Console]:
    async with Console().served() as served:
        yield served


@pytest.fixture
async def guarded() -> AsyncIterator[Console]:
    async with Console(authenticate=only_the_right_token).served() as served:
        yield served


@pytest.fixture
async def browser() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps cookies, and takes the loopback for confidential as browsers do."""

    class Jar(aiohttp.CookieJar):
        def filter_cookies(self, request_url: URL = URL()):  # type: ignore[no-untyped-def] # noqa: B008
            return super().filter_cookies(request_url.with_scheme("https"))

    async with aiohttp.ClientSession(cookie_jar=Jar(unsafe=True)) as session:
        yield session


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:80", "LOCALHOST:8000", "127.0.0.1", "127.9.9.9:1", "[::1]:8"]
)
def test_loopback_names_are_known(host: str) -> None:
    assert is_loopback_name(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "",
        "[::1",
        "0",
    ],
)
def test_other_names_are_not_loopback(host: str) -> None:
    assert not is_loopback_name(host)


@pytest.mark.parametrize("path", PAGES)
async def test_a_name_that_points_here_from_elsewhere_is_not_answered(
    console: Console, path: str
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(console.url + path, headers={"Host": "evil.example"}) as response,
    ):
        assert response.status == 421
        assert "evil.example" in await response.text()
    assert console.fleet.asked == []


async def test_the_rules_of_the_console_leave_other_routes_alone(console: Console) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{console.url}/v2/health/live", headers={"Host": "hub.example"}) as response,
    ):
        assert response.status == 200
        assert "Content-Security-Policy" not in response.headers


@pytest.mark.parametrize("path", ["/", "/?window=7", "/api/v1/overview", "/static/0/x.js"])
async def test_every_answer_of_the_console_has_its_security_headers(
    console: Console, path: str
) -> None:
    async with aiohttp.ClientSession() as session, session.get(console.url + path) as response:
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "same-origin"


async def test_figures_are_never_kept_by_a_cache(console: Console) -> None:
    async with aiohttp.ClientSession() as session, session.get(console.url) as response:
        assert response.headers["Cache-Control"] == "no-store"


def test_a_session_ends_by_itself() -> None:
    sessions = Sessions()
    key = sessions.start("t", now=0.0)
    assert sessions.token(key, now=SESSION_S - 1) == "t"
    assert sessions.token(key, now=SESSION_S) is None
    sessions.start("u", now=SESSION_S)
    assert len(sessions) == 1


def test_sessions_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "SESSIONS_KEPT", 3)
    sessions = Sessions()
    keys = [sessions.start(str(i), now=float(i)) for i in range(5)]
    assert len(sessions) == 3
    assert sessions.token(keys[0], now=5.0) is None
    assert sessions.token(keys[4], now=5.0) == "4"


async def test_a_stranger_is_sent_to_the_sign_in_page(
    guarded: Console, browser: aiohttp.ClientSession
) -> None:
    async with browser.get(f"{guarded.url}/?window=60", allow_redirects=False) as response:
        assert response.status == 303
        location = URL(response.headers["Location"])
        assert (location.path, location.query["next"]) == ("/login", "/?window=60")
    assert guarded.fleet.asked == []


async def test_a_program_without_a_token_gets_401(
    guarded: Console, browser: aiohttp.ClientSession
) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        async with browser.get(f"{guarded.url}/api/v1/overview", headers=headers) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.content_type == "application/problem+json"
            assert "fogline token create" in await response.text()


async def test_a_program_shows_its_token(guarded: Console, browser: aiohttp.ClientSession) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with browser.get(f"{guarded.url}/api/v1/overview", headers=headers) as response:
        assert response.status == 200


async def test_a_token_becomes_a_session_and_a_session_ends(
    guarded: Console, browser: aiohttp.ClientSession
) -> None:
    form = {"token": f" {TOKEN} ", "next": "/?window=60"}
    async with browser.post(
        f"{guarded.url}/login", data=form, headers={"Origin": guarded.url}, allow_redirects=False
    ) as response:
        assert (response.status, response.headers["Location"]) == (303, "/?window=60")
        cookie = response.headers["Set-Cookie"]
    assert TOKEN not in cookie
    for attribute in ("HttpOnly", "SameSite=Strict", "Secure", "Path=/"):
        assert attribute in cookie
    async with browser.get(guarded.url) as response:
        assert "Sign out" in await response.text()
    async with browser.get(f"{guarded.url}/api/v1/overview") as response:
        assert response.status == 200
    before = browser.cookie_jar.filter_cookies(URL(guarded.url))[access.COOKIE].value
    async with browser.post(f"{guarded.url}/logout", headers={"Origin": guarded.url}) as response:
        assert response.url.path == "/login"
    stolen = {"Cookie": f"{access.COOKIE}={before}"}
    async with (
        aiohttp.ClientSession() as thief,
        thief.get(f"{guarded.url}/api/v1/overview", headers=stolen) as response,
    ):
        assert response.status == 401


async def test_a_wrong_token_is_refused_with_a_sentence(
    guarded: Console, browser: aiohttp.ClientSession
) -> None:
    for token in ("wrong", ""):
        async with browser.post(f"{guarded.url}/login", data={"token": token}) as response:
            assert response.status == 403
            assert "unknown, revoked or expired" in await response.text()
            assert "Set-Cookie" not in response.headers


async def test_a_revoked_token_ends_its_sessions(browser: aiohttp.ClientSession) -> None:
    valid = {TOKEN}

    async def authenticate(token: str) -> object:
        return object() if token in valid else None

    async with Console(authenticate=authenticate).served() as console:  # type: ignore[arg-type]
        async with browser.post(f"{console.url}/login", data={"token": TOKEN}) as response:
            assert response.url.path == "/"
        valid.clear()
        async with browser.get(f"{console.url}/api/v1/overview") as response:
            assert response.status == 401


@pytest.mark.parametrize("path", ["/login", "/logout"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "["])
async def test_a_form_of_another_site_is_refused(
    guarded: Console, browser: aiohttp.ClientSession, path: str, origin: str
) -> None:
    async with browser.post(
        guarded.url + path, data={"token": TOKEN}, headers={"Origin": origin}
    ) as response:
        assert response.status == 403
        assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
async def test_a_page_of_another_site_cannot_operate_a_hub_that_asks_for_no_token(
    console: Console, browser: aiohttp.ClientSession, origin: str
) -> None:
    # Browsers send such a request without asking first; only its answer is kept from the page.
    async with browser.post(
        f"{console.url}/api/v1/deployments",
        data='{"release": "digits@2", "devices": null}',
        headers={"Origin": origin, "Content-Type": "text/plain"},
    ) as response:
        assert response.status == 403
        assert origin in (await response.json(content_type=None))["detail"]


async def test_a_token_is_not_asked_for_over_a_readable_connection(
    guarded: Console, browser: aiohttp.ClientSession
) -> None:
    elsewhere = {"Host": "hub.example"}
    async with browser.get(f"{guarded.url}/login", headers=elsewhere) as response:
        page = await response.text()
    assert "needs HTTPS" in page
    assert "<form" not in page
    async with browser.post(
        f"{guarded.url}/login", data={"token": TOKEN}, headers=elsewhere
    ) as response:
        assert response.status == 403
        assert "Set-Cookie" not in response.headers
    behind_tls = elsewhere | {"X-Forwarded-Proto": "https"}
    async with browser.get(f"{guarded.url}/login", headers=behind_tls) as response:
        assert 'name="token"' in await response.text()


@pytest.mark.parametrize(
    "elsewhere",
    ["//evil.example", "/\\evil.example", "https://evil.example", "", "/\t/evil.example"],
)
async def test_signing_in_never_leads_to_another_site(
    guarded: Console, browser: aiohttp.ClientSession, elsewhere: str
) -> None:
    async with browser.post(
        f"{guarded.url}/login", data={"token": TOKEN, "next": elsewhere}, allow_redirects=False
    ) as response:
        assert response.headers["Location"] == "/"


async def test_a_form_too_large_is_not_read(
    guarded: Console, browser: aiohttp.ClientSession
) -> None:
    async with browser.post(f"{guarded.url}/login", data={"token": "x" * 100_000}) as response:
        assert response.status == 413
        assert "at most 4096 bytes are taken" in (await response.json())["detail"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_without_tokens_there_is_nothing_to_sign_in_to(
    console: Console, browser: aiohttp.ClientSession
) -> None:
    async with browser.get(f"{console.url}/login") as response:
        assert response.url.path == "/"
        assert "Sign out" not in await response.text()
