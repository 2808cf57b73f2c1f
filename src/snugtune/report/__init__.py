"""`report.html`: what a run did, on one page that needs nothing but itself."""

from snugtune.report.page import render, write_report

__all__ = ["render", "write_report"]
