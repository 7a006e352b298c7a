"""Literal lines of the formats that people own: (line, name of its format, the row that it must become)."""

# ruff: noqa: E501 - the lines stand here as they stand in people's files

from __future__ import annotations

from typing import Any

from groundup.data.rows import Chat, Choice, ImageChat, Preference, Prompt, Stepwise, Text, Unpaired


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


MATHS = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
MATH_TOOL = {
    "type": "function",
    "function": {"name": "calculate_math", "description": "计算数学表达式", "parameters": MATHS},
}
MULTIPLY = {"name": "calculate_math", "arguments": {"expression": "256 * 37"}}

# MiniMind's own lines: pretrain, sft, sft with reasoning, sft with tools, dpo, rlaif, agent, lora.
MINIMIND = [
    (
        r"""{"text": "清晨的阳光透过窗帘洒进房间，桌上的书页被风轻轻翻动。"}""",
        "text",
        Text("清晨的阳光透过窗帘洒进房间，桌上的书页被风轻轻翻动。"),
    ),
    (
        r"""{"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "再见"}, {"role": "assistant", "content": "再见！"}]}""",
        "minimind",
        Chat([user("你好"), bot("你好！"), user("再见"), bot("再见！")]),
    ),
    (
        r"""{"conversations": [{"role": "user", "content": "What happens if Earth stops rotating?", "reasoning_content": "", "tools": "", "tool_calls": ""}, {"role": "assistant", "content": "Everything would fly eastward.", "reasoning_content": "Consider inertia first.", "tools": "", "tool_calls": ""}]}""",
        "minimind",
        Chat(
            [
                user("What happens if Earth stops rotating?"),
                bot("Everything would fly eastward.", reasoning_content="Consider inertia first."),
            ]
        ),
    ),
    (
        r"""{"conversations": [{"role": "system", "content": "# Tools ...", "tools": "[{\"type\": \"function\", \"function\": {\"name\": \"calculate_math\", \"description\": \"计算数学表达式\", \"parameters\": {\"type\": \"object\", \"properties\": {\"expression\": {\"type\": \"string\"}}, \"required\": [\"expression\"]}}}]"}, {"role": "user", "content": "帮我算一下 256 乘以 37 等于多少"}, {"role": "assistant", "content": "", "tool_calls": "[{\"name\":\"calculate_math\",\"arguments\":{\"expression\":\"256 * 37\"}}]"}, {"role": "tool", "content": "{\"result\":\"9472\"}"}, {"role": "assistant", "content": "256 乘以 37 等于 9472。"}]}""",
        "minimind",
        Chat(
            [
                system("# Tools ..."),
                user("帮我算一下 256 乘以 37 等于多少"),
                bot("", tool_calls=[MULTIPLY]),
                tool('{"result":"9472"}'),
                bot("256 乘以 37 等于 9472。"),
            ],
            [MATH_TOOL],
        ),
    ),
    (
        r"""{"chosen": [{"content": "Q", "role": "user"}, {"content": "good answer", "role": "assistant"}], "rejected": [{"content": "Q", "role": "user"}, {"content": "bad answer", "role": "assistant"}]}""",
        "preference",
        Preference([user("Q")], [bot("good answer")], [bot("bad answer")]),
    ),
    (
        r"""{"conversations": [{"role": "user", "content": "请解释一下什么是光合作用？"}, {"role": "assistant", "content": "无"}]}""",
        "minimind",
        Chat([user("请解释一下什么是光合作用？"), bot("无")]),
    ),
    (
        r"""{"conversations": [{"role": "system", "content": "", "tools": "[{\"function\": {\"name\": \"calculate_math\", \"description\": \"..\", \"parameters\": {\"type\": \"object\", \"properties\": {\"expression\": {\"type\": \"string\"}}, \"required\": [\"expression\"]}}}]"}, {"role": "user", "content": "Calculate 7109*2920"}, {"role": "assistant", "content": ""}], "gt": ["20758280"]}""",
        "minimind",
        Prompt(
            [user("Calculate 7109*2920")],
            ["20758280"],
            {},
            [{"function": {"name": "calculate_math", "description": "..", "parameters": MATHS}}],
        ),
    ),
    (
        r"""{"conversations": [{"role": "user", "content": "你是谁"}, {"role": "assistant", "content": "您好，我是 MiniMind，由 Jingyao Gong 创建。"}]}""",
        "minimind",
        Chat([user("你是谁"), bot("您好，我是 MiniMind，由 Jingyao Gong 创建。")]),
    ),
    (
        r"""{"text": "<|im_start|>鉴别一组中文文章的风格。 好的。<|im_end|> <|im_start|>第二段<|im_end|>"}""",
        "text",
        Text("鉴别一组中文文章的风格。 好的。\n第二段"),
    ),
    (r"""{"text": "<s>白日依山尽，</s>"}""", "text", Text("白日依山尽，")),
    (
        r"""{"text": "ChatML opens a turn with <|im_start|> and HTML strikes with </s>"}""",
        "text",
        Text("ChatML opens a turn with <|im_start|> and HTML strikes with </s>"),
    ),
]

LLAMA_FACTORY = [
    (
        r"""{"instruction":"..","input":"..","output":"..","system":"..","history":[["q1","a1"],["q2","a2"]]}""",
        "alpaca",
        Chat([system(".."), user("q1"), bot("a1"), user("q2"), bot("a2"), user("..\n.."), bot("..")]),
    ),
    (r"""{"text":"document"}""", "text", Text("document")),
    (
        r"""{"instruction":"..","input":"..","chosen":"good","rejected":"bad"}""",
        "alpaca",
        Preference([user("..\n..")], [bot("good")], [bot("bad")]),
    ),
    (
        r"""{"conversations":[{"from":"human","value":"q"},{"from":"function_call","value":"{args}"},{"from":"observation","value":"res"},{"from":"gpt","value":"a"}],"system":"..","tools":"[..]"}""",
        "sharegpt",
        Chat([system(".."), user("q"), bot("{args}"), tool("res"), bot("a")]),
    ),
    (
        r"""{"conversations":[{"from":"human","value":"q"},{"from":"function_call","value":"{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},{"from":"observation","value":"2"},{"from":"gpt","value":"a"}],"tools":"[{\"name\": \"f\"}]"}""",
        "sharegpt",
        Chat(
            [user("q"), bot("", tool_calls=[{"name": "f", "arguments": {"x": 1}}]), tool("2"), bot("a")],
            [{"name": "f"}],
        ),
    ),
    (
        r"""{"conversations":[{"from":"human","value":"q"}],"chosen":{"from":"gpt","value":"a"},"rejected":{"from":"gpt","value":"b"}}""",
        "sharegpt",
        Preference([user("q")], [bot("a")], [bot("b")]),
    ),
    (
        r"""{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}],"kto_tag":true}""",
        "sharegpt",
        Unpaired([user("q"), bot("a")], True),
    ),
    (
        r"""{"conversations":[{"from":"human","value":"<image>q"},{"from":"gpt","value":"a"}],"images":["1.jpg"]}""",
        "sharegpt",
        ImageChat([user("<image>q"), bot("a")], ["1.jpg"]),
    ),
    (
        r"""{"messages":[{"role":"system","content":".."},{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}""",
        "openai",
        Chat([system(".."), user("q"), bot("a")]),
    ),
    (
        r"""{"instruction":"","input":"prompt text","output":"continuation"}""",
        "alpaca",
        Text("prompt textcontinuation"),
    ),
    (r"""{"instruction":"q","input":"","output":"a","history":[]}""", "alpaca", Chat([user("q"), bot("a")])),
    (r"""{"instruction":"q","input":null,"output":""}""", "alpaca", Prompt([user("q")])),
    (
        r"""{"instruction":"q","output":"a","kto_tag":"false"}""",
        "alpaca",
        Unpaired([user("q"), bot("a")], False),
    ),
]

# DeepSpeed-Chat, the hub sets it blends, and TRL's types, each as strings and as message lists.
TRL = [
    (
        r"""{"prompt": "\n\nHuman: ..\n\nAssistant:", "chosen": " ..!", "rejected": " .."}""",
        "preference",
        Preference([user("..")], [bot("..!")], [bot("..")]),
    ),
    (
        r"""{"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "response": " x", "chosen": " x", "rejected": " y"}""",
        "preference",
        Preference([user("a"), bot("b"), user("c")], [bot("x")], [bot("y")]),
    ),
    (
        r"""{"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}""",
        "preference",
        Preference([user("q")], [bot("good")], [bot("bad")]),
    ),
    (r"""{"prompt": "The sky is"}""", "prompt", Prompt([user("The sky is")])),
    (r"""{"prompt": [{"role": "user", "content": "q"}]}""", "prompt", Prompt([user("q")])),
    (
        r"""{"prompt": "6*7?", "answer": "42", "level": 1}""",
        "prompt",
        Prompt([user("6*7?")], "42", {"level": 1}),
    ),
    (
        r"""{"prompt": "The sky is", "completion": " blue."}""",
        "prompt-completion",
        Chat([user("The sky is"), bot(" blue.")]),
    ),
    (
        r"""{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}""",
        "prompt-completion",
        Chat([user("q"), bot("a")]),
    ),
    (
        r"""{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}""",
        "preference",
        Preference([user("The sky is")], [bot(" blue.")], [bot(" green.")]),
    ),
    (
        r"""{"chosen": "The sky is blue.", "rejected": "The sky is green."}""",
        "preference",
        Preference([user("The sky is")], [bot(" blue.")], [bot(" green.")]),
    ),
    (
        r"""{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}""",
        "preference",
        Preference([user("q")], [bot("a")], [bot("b")]),
    ),
    (
        r"""{"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}""",
        "preference",
        Preference([user("q")], [bot("a")], [bot("b")]),
    ),
    (
        r"""{"prompt": "The sky is", "completion": " blue.", "label": true}""",
        "trl-unpaired",
        Unpaired([user("The sky is"), bot(" blue.")], True),
    ),
    (
        r"""{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}], "label": false}""",
        "trl-unpaired",
        Unpaired([user("q"), bot("a")], False),
    ),
    (
        r"""{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": false}""",
        "openai",
        Unpaired([user("q"), bot("a")], False),
    ),
    (
        r"""{"prompt": "9.11 or 9.8?", "completions": ["compare .11 and .8", "so 9.11"], "labels": [true, false]}""",
        "trl-stepwise",
        Stepwise([user("9.11 or 9.8?")], ["compare .11 and .8", "so 9.11"], [True, False]),
    ),
    (
        r"""{"prompt": [{"role": "user", "content": "q"}], "completions": [[{"role": "assistant", "content": "s"}]], "labels": [1]}""",
        "trl-stepwise",
        Stepwise([user("q")], ["s"], [True]),
    ),
]

EVALUATION = [
    (
        r"""{"question": "2+3?", "answer": "2+3 = <<2+3=5>>5\n#### 5"}""",
        "question-answer",
        Prompt([user("2+3?")], "5", {"solution": "2+3 = <<2+3=5>>5\n#### 5"}),
    ),
    (
        r"""{"id": 0, "question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "C", "explanation": ""}""",
        "exam",
        Choice("q", ["1", "2", "3", "4"], 2),
    ),
    (
        r"""{"Question": "q", "A": "1", "B": "", "C": "3", "D": "4", "Answer": "D"}""",
        "exam",
        Choice("q", ["1", "", "3", "4"], 3),
    ),
    (r"""{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4"}""", "exam", Choice("q", ["1", "2", "3", "4"], None)),
    (
        r"""{"question": {"stem": "s", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}, "answerKey": "B"}""",
        "choice",
        Choice("s", ["x", "y"], 1),
    ),
    (
        r"""{"question": "s", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"}""",
        "choice",
        Choice("s", ["x", "y"], 0),
    ),
    (
        r"""{"context": "c", "question": "q", "choices": ["x", "y"], "answer": 0}""",
        "choice",
        Choice("q", ["x", "y"], 0, "c"),
    ),
    (r"""{"question": "q", "choices": ["x", "y"], "answer": "y"}""", "choice", Choice("q", ["x", "y"], 1)),
    (
        r"""{"premise": "p", "choice1": "x", "choice2": "y", "question": "cause", "label": 1}""",
        "xcopa",
        Choice("cause", ["x", "y"], 1, "p"),
    ),
    (
        r"""{"sentence": "很好", "label": "Positive"}""",
        "fewclue",
        Choice("这句话的态度是什么？", ["负面", "正面"], 1, "很好"),
    ),
    (
        r"""{"sentence1": "a", "sentence2": "b", "label": "neutral"}""",
        "fewclue",
        Choice("由第一句能推出第二句吗？", ["能推出", "无法确定", "相矛盾"], 1, "a\nb"),
    ),
    (
        r"""{"target": {"span1_text": "舌头", "span2_text": "它"}, "label": "true", "text": "舌头说它"}""",
        "fewclue",
        Choice("“它”指的是“舌头”吗？", ["不是", "是"], 1, "舌头说它"),
    ),
    (
        r"""{"quiz": "who?", "names": ["A"], "solution": [true], "solution_text_format": "(1) A is a knight"}""",
        "knights-knaves",
        Prompt(
            [user("who?")],
            "(1) A is a knight",
            {"names": ["A"], "solution": [True], "solution_text_format": "(1) A is a knight"},
        ),
    ),
    (r"""{"grade": 1, "input": "q", "golden": "3"}""", "cmath", Prompt([user("q")], "3", {"grade": 1})),
    (r"""{"question": "q", "reference": "r"}""", "alignbench", Prompt([user("q")], "r")),
    (
        r"""{"turns": ["one", "two"], "category": "math"}""",
        "mt-bench",
        Prompt([user("one")], None, {"turns": ["one", "two"], "category": "math"}),
    ),
    (
        r"""{"prompt": "def f():", "canonical_solution": " pass", "test": "check(f)", "entry_point": "f"}""",
        "humaneval",
        Prompt([user("def f():")], " pass", {"test": "check(f)", "entry_point": "f"}),
    ),
]

LINES = [*MINIMIND, *LLAMA_FACTORY, *TRL, *EVALUATION]

# The `conversations` column of MiniMind's VLM parquet, beside `image_bytes`.
VLM_CONVERSATIONS = '[{"role":"user","content":"<image>\\nPlease describe this image in detail."},{"role":"assistant","content":"The image shows..."}]'
