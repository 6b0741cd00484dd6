"""An artifact behind the OpenAI API.

It reads what is asked, gives each request its turn, and says what was written as it is written.
"""
