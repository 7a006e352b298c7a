// Renders a template as Ollama does: {"template", "cases": [values, ...]} on stdin, a JSON list of texts on stdout.
// The types are those of Ollama's api.Message, as far as a chat template can see them.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Arguments map[string]any

func (a Arguments) String() string { b, _ := json.Marshal(a); return string(b) }

type Function map[string]any

func (f Function) String() string { b, _ := json.Marshal(f); return string(b) }

type ToolCall struct {
	Function struct {
		Name      string
		Arguments Arguments
	}
}

type Message struct {
	Role, Content, Thinking string
	ToolCalls               []ToolCall
}

type Tool struct {
	Type     string
	Function Function
}

type Values struct {
	Messages          []*Message
	Tools             []Tool
	Think, IsThinkSet bool
}

func main() {
	var given struct {
		Template string
		Cases    []Values
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	texts := []string{}
	for _, values := range given.Cases {
		var system []string
		for _, message := range values.Messages {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
		}
		var out bytes.Buffer
		seen := map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": values.Messages, "Tools": values.Tools,
			"Response": "", "Think": values.Think, "IsThinkSet": values.IsThinkSet,
		}
		if err := parsed.Execute(&out, seen); err != nil {
			panic(err)
		}
		texts = append(texts, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
