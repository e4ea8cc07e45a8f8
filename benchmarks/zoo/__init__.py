"""Models of published sizes, as shapes only: what the search is measured on. `zoo.registry` lists them."""
