"""`/console`: the state of everything."""

from evalstore.console.pages import Answer, Pages, View

pages = Pages()


@pages.page("", "overview.html", "Overview", key="o")
async def overview(_view: View) -> Answer:
    """Show the state of everything."""
    return {}
