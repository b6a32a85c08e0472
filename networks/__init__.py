"""Published networks that more than one module is made of, and what public files call their layers."""
