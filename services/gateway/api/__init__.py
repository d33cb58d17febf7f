"""What there is for editors: OpenAI's completions and chat, llama.cpp's infill, models, feedback."""
