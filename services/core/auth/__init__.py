"""Who calls, and whether it may: API keys and OIDC tokens, roles, and one table of what every RPC asks for."""
