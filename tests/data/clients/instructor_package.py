"""Instructor: objects of a class, by tools and by a schema."""

import json
import os
import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel, extra="forbid"):
    """Somebody."""

    name: Literal["Mary", "Tom"]
    age: Literal[30, 40]


URL = f"{os.environ['URL']}/v1"
made = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)
    person = client.chat.completions.create(
        model="tgi",
        response_model=Person,
        messages=[{"role": "user", "content": "Mary is 30. Who is she?"}],
        temperature=0,
        max_tokens=100,
        max_retries=0,
    )
    made[mode.value] = person.model_dump()
sys.stdout.write(json.dumps(made) + "\n")
