"""How does the page look? The few rules that streamlit's theme has no setting for."""

from __future__ import annotations

# Options of `streamlit run`: light and dark follow the browser, one quiet accent, no toolbar of a developer.
THEME = {
    "theme.light.primaryColor": "#2f6f8f",
    "theme.dark.primaryColor": "#7fb3cc",
    "theme.baseRadius": "0.6rem",
    "client.toolbarMode": "minimal",
}

# Keys of containers become classes (st-key-...). Grey by opacity reads on light and dark alike.
CSS = """<style>
[data-testid="stMainBlockContainer"] { padding-top: 4.5rem; padding-bottom: 1rem; }
[data-testid="stBottomBlockContainer"] { padding-bottom: 1.5rem; }
[data-testid="stSidebarUserContent"] { padding-top: 0; }
[data-testid="stLayoutWrapper"]:has(> [class*="st-key-said-"]) { max-width: 85%; }
[class*="st-key-said-"] {
  padding: .55rem .9rem; border-radius: 1rem; background: rgba(128, 128, 128, .13);
}
[class*="st-key-said-"] [data-testid="stText"] { white-space: pre-wrap; overflow-wrap: anywhere; }
[class*="st-key-answer-"] { gap: .5rem; overflow-wrap: anywhere; }
[class*="st-key-thinking-"] details { border: none; background: rgba(128, 128, 128, .06); }
[class*="st-key-thinking-"] [data-testid="stMarkdownContainer"] { font-size: .92rem; opacity: .75; }
[class*="st-key-greeting"] { padding-top: 22vh; }
[class*="st-key-greeting"] h3 { text-align: center; }
[class*="st-key-actions"] button { opacity: .7; padding: 0 .4rem; min-height: 1.8rem; }
[class*="st-key-history"] button { justify-content: flex-start; min-height: 1.8rem; padding: 0 .3rem; }
[class*="st-key-history"] button p { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
</style>"""
