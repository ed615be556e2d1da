"""The report of a run: pictures and one self-contained HTML page."""

from orthorank.report.page import html_page

__all__ = ["html_page"]
