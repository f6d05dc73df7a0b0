"""Tables, pages and figures made of records."""
