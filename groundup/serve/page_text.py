"""What does the page say? Every label, English and Chinese side by side."""

from __future__ import annotations

from collections.abc import Callable

from groundup.serve.page_chat import Fault

LANGUAGES = {"en": "English", "zh": "中文"}

LABELS: dict[str, tuple[str, str]] = {
    "language": ("Language", "语言"),
    "new_chat": ("New chat", "新对话"),
    "untitled": ("Empty chat", "空对话"),
    "greeting": ("What would you like to ask?", "想问点什么？"),
    "placeholder": ("Message {model}", "给 {model} 发消息"),
    "columns": ("Side by side", "并排对比"),
    "model": ("Model", "模型"),
    "model_of": ("Model {number}", "模型 {number}"),
    "adapter": ("{name} (adapter of {parent})", "{name}（{parent} 的适配器）"),
    "blind": ("Pictures are off: {model} reads text only.", "图片已关闭：{model} 只能读文字。"),
    "system": ("System prompt", "系统提示词"),
    "system_hint": ("Who should it be? Empty: nobody in particular.", "它应该是谁？留空则不指定。"),
    "sampling": ("Sampling", "采样设置"),
    "sampling_hint": ("An empty field leaves the model's own setting.", "留空则使用模型自己的设置。"),
    "default": ("default", "默认"),
    "thinking": ("Thinking", "思考"),
    "auto": ("Auto", "自动"),
    "on": ("On", "开"),
    "off": ("Off", "关"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k", "Top-k"),
    "min_p": ("Min-p", "Min-p"),
    "max_tokens": ("Max tokens", "最大 token 数"),
    "seed": ("Seed", "随机种子"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "presence_penalty": ("Presence penalty", "存在惩罚"),
    "frequency_penalty": ("Frequency penalty", "频率惩罚"),
    "tools": ("Tools", "工具"),
    "tools_hint": (
        "A JSON list of OpenAI tool schemas. Calls are shown, not run.",
        "OpenAI 格式的工具 JSON 列表。调用只显示，不执行。",
    ),
    "tools_bad": ("Tools are not sent: {why}", "工具未发送：{why}"),
    "tools_not_list": ("write a JSON list of objects", "请写成由对象组成的 JSON 列表"),
    "download": ("Download JSON", "下载 JSON"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新生成"),
    "retry": ("Try again", "重试"),
    "edit": ("Edit", "编辑"),
    "send": ("Send", "发送"),
    "cancel": ("Cancel", "取消"),
    "waiting": ("Waiting for the model…", "等待模型…"),
    "writing": ("Writing…", "正在输出…"),
    "thinking_now": ("Thinking…", "思考中…"),
    "thought": ("Thought for {seconds:.1f} s", "思考了 {seconds:.1f} 秒"),
    "figures": (
        "{tokens} tokens · {seconds:.1f} s · {rate:.0f} tokens/s",
        "{tokens} 个 token · {seconds:.1f} 秒 · 每秒 {rate:.0f} 个",
    ),
    "stopped": ("Stopped", "已停止"),
    "length": ("Cut off at the token limit", "已达到 token 上限"),
    "content_filter": ("Withheld by the server", "已被服务器拦截"),
    "unreachable": ("The server cannot be reached", "无法连接服务器"),
    "timeout": ("The server does not answer", "服务器没有回应"),
    "key": ("The server refuses the key", "服务器拒绝了密钥"),
    "busy": ("The server is busy; try again in a moment", "服务器繁忙，请稍后再试"),
    "refused": ("The request was refused", "请求被拒绝"),
    "server": ("The server failed", "服务器出错"),
    "broken": ("The answer broke off", "回答中断"),
    "no_models": ("The server offers no model", "服务器没有可用的模型"),
}  # fmt: skip

Say = Callable[..., str]


def speaker(language: str) -> Say:
    """say("label", name=value): the label in a language, its fields filled."""
    index = list(LANGUAGES).index(language)

    def say(label: str, **fields: object) -> str:
        return LABELS[label][index].format(**fields)

    return say


def say_fault(say: Say, fault: Fault) -> str:
    """A fault in one line."""
    return f"{say(fault.kind)}: {fault.detail}" if fault.detail else say(fault.kind)


def language_of(locale: str | None) -> str:
    """The page's language for a locale as browsers and LANG spell it (zh-CN, zh_CN.UTF-8, en-US, C)."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
