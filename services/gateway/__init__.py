"""The HTTP edge over the gRPC services: an OpenAI-compatible API for editors. It holds no state and no model.

edge/ is what every request goes through, api/ what there is for editors. A console for people has its place beside
them: more routes in assembly.py, behind the same edge.
"""
