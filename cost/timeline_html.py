def to_html(t): return ""
