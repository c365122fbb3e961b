"""The report: one offline HTML page, and its plots.

`page.Page` holds everything the page shows; `page.write` draws it.
"""
