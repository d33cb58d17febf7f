"""The console: what people see. Pages made on the server, of RPCs with the caller's own key; it keeps nothing."""
