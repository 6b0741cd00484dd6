"""An artifact behind the OpenAI API: what is asked, whose turn it is, and what is said."""
