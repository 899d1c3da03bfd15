"""A page taken apart, for tests to look at."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The page as elements, tables and text; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.tables, self.text = [], [], {}, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.text += " "
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "caption":
            self.caption = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "code" in self.open and "th" in self.open:
            return  # a metric's own name beside the words
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "caption":
            self.caption += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(self.text.split())


def check_stands_alone(page, text):
    """One well-formed document that fetches nothing and runs nothing."""
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|<script|@import|url\(|javascript:", text)
    for name, attrs in page.elements:
        assert name != "script"
        for link in ("src", "href"):
            assert attrs.get(link, "data:").startswith("data:"), (name, attrs)
        assert not [key for key in attrs if key.startswith("on")]
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert page.all("html") == [{"lang": "en"}]


def ids_and_labels(page):
    """Ids, each once, and the set of those that sections name as their headings."""
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    return set(ids), {attrs["aria-labelledby"] for attrs in page.all("section")}
