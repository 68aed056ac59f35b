//! Arguments of the CLI → fields of the session. What a session has a field for becomes that field; the rest is passed on, and
//! the cluster's rules say what may not be.

use crds::{
    AgenticSessionSpec,
    session::{Argument, Limits, LlmSettings, PermissionMode, ToolRule, Tools},
};
use serde_json::Value;

use super::super::ApiError;

/// Flags that a session has a field for, with whether they take all words that follow.
const FIELDS: [(&str, bool); 10] = [
    ("--model", false),
    ("--fallback-model", false),
    ("--max-turns", false),
    ("--append-system-prompt", false),
    ("--permission-mode", false),
    ("--allowedTools", true),
    ("--allowed-tools", true),
    ("--disallowedTools", true),
    ("--disallowed-tools", true),
    ("--dangerously-skip-permissions", false),
];

/// Applies a request's arguments.
pub(super) fn apply(spec: &mut AgenticSessionSpec, arguments: Vec<String>) -> Result<(), ApiError> {
    let mut rest = Vec::new();
    let mut words = arguments.into_iter().peekable();
    while let Some(word) = words.next() {
        let (flag, given) = match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag.to_owned(), Some(value.to_owned())),
            _ => (word.clone(), None),
        };
        // The CLI's own output is always all of it.
        if flag == "--verbose" {
            continue;
        }
        let Some((_, many)) = FIELDS.iter().find(|(known, _)| *known == flag) else {
            rest.push(Argument(word));
            continue;
        };
        let mut values: Vec<String> = given.into_iter().collect();
        if flag != "--dangerously-skip-permissions" {
            while (values.is_empty() || *many)
                && let Some(value) = words.next_if(|next| !next.starts_with("--"))
            {
                values.push(value);
            }
            if values.is_empty() {
                return Err(ApiError::bad_request(format!("additionalArgs: {flag} needs a value")));
            }
        }
        field(spec, &flag, values)?;
    }
    // Rules of tools do nothing where everything is allowed.
    if let Some(tools) = &mut spec.tools
        && !tools.allowed.is_empty()
    {
        tools.permission_mode.get_or_insert(PermissionMode::Default);
    }
    spec.additional_args = rest;
    Ok(())
}

fn field(spec: &mut AgenticSessionSpec, flag: &str, mut values: Vec<String>) -> Result<(), ApiError> {
    let value = values.first().cloned().unwrap_or_default();
    let wrong = |what: &str| ApiError::bad_request(format!("additionalArgs: {flag} {value:?} is no {what}"));
    match flag {
        "--model" => spec.llm_settings.get_or_insert_with(LlmSettings::default).model = Some(value),
        "--fallback-model" => {
            let settings = spec.llm_settings.get_or_insert_with(LlmSettings::default);
            settings.fallback_model = Some(value);
        }
        "--max-turns" => {
            let most = value.parse().map_err(|_| wrong("number"))?;
            spec.limits.get_or_insert_with(Limits::default).max_turns = Some(most);
        }
        "--append-system-prompt" => spec.append_system_prompt = Some(value),
        "--permission-mode" => {
            let mode = serde_json::from_value(Value::from(value.clone())).map_err(|_| wrong("permission mode"))?;
            spec.tools.get_or_insert_with(Tools::default).permission_mode = Some(mode);
        }
        "--dangerously-skip-permissions" => {
            spec.tools.get_or_insert_with(Tools::default).permission_mode = Some(PermissionMode::BypassPermissions);
        }
        _ => {
            let rules = values.drain(..).flat_map(|value| rules(&value)).map(ToolRule);
            let tools = spec.tools.get_or_insert_with(Tools::default);
            if flag.contains("isallowed") {
                tools.disallowed.extend(rules);
            } else {
                tools.allowed.extend(rules);
            }
        }
    }
    Ok(())
}

/// The rules of a list, which commas or spaces separate, outside of parentheses.
fn rules(text: &str) -> Vec<String> {
    let (mut rules, mut depth) = (vec![String::new()], 0_usize);
    for character in text.chars() {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' | ' ' if depth == 0 => {
                rules.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(rule) = rules.last_mut() {
            rule.push(character);
        }
    }
    rules.retain(|rule| !rule.is_empty());
    rules
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case(&["--effort", "high"], json!({"additionalArgs": ["--effort", "high"]}))]
    #[case(&["--allowedTools", "Bash(git log, x),Read", "Edit", "--effort=low"],
        json!({"tools": {"allowed": ["Bash(git log, x)", "Read", "Edit"], "permissionMode": "default"}, "additionalArgs": ["--effort=low"]}))]
    #[case(&["--permission-mode", "plan", "--verbose"], json!({"tools": {"permissionMode": "plan"}}))]
    #[case(&["--disallowed-tools=WebFetch"], json!({"tools": {"disallowed": ["WebFetch"]}}))]
    #[case(&["--append-system-prompt", "Be brief.", "--max-turns", "7"],
        json!({"appendSystemPrompt": "Be brief.", "limits": {"maxTurns": 7}}))]
    fn an_argument_that_is_a_field_becomes_it_and_others_are_passed_on(
        #[case] arguments: &[&str],
        #[case] spec: Value,
    ) {
        let mut made = AgenticSessionSpec::default();
        apply(&mut made, arguments.iter().map(|&word| word.to_owned()).collect()).unwrap();
        assert_eq!(serde_json::to_value(made).unwrap(), spec);
    }

    #[rstest]
    #[case(&["--model"], "--model needs a value")]
    #[case(&["--max-turns", "many"], "is no number")]
    #[case(&["--permission-mode", "yolo"], "is no permission mode")]
    fn an_argument_that_cannot_be_understood_is_refused_by_name(#[case] arguments: &[&str], #[case] says: &str) {
        let arguments = arguments.iter().map(|&word| word.to_owned()).collect();
        let error = apply(&mut AgenticSessionSpec::default(), arguments).unwrap_err();
        assert!(error.message().contains(says), "{error:?}");
    }
}
