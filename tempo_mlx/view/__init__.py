"""A run or a search as a piece of HTML that needs no server, drawn by ``view.js``.

``view.js`` is a plain ES module: ``render(element, data, actions)``. It is put into the HTML as it
is, and can be served as a file to a page that shows runs while they go on.
"""

from .html import MODULE, page, snippet

__all__ = ["MODULE", "page", "snippet"]
