//! The OpenAPI 3.1 document, made from the table of routes.

use bytes::Bytes;
use utoipa::openapi::extensions::ExtensionsBuilder;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{HttpMethod, Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Components, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathsBuilder, Ref, RefOr, Required, Response, ResponseBuilder, Tag,
};
use utoipa::{PartialSchema, ToSchema};

use optimus_common::api::v1::{FieldError, Problem};

use super::context::Consistency;
use super::problem::PROBLEM_JSON;
use super::routes::{Patience, Route, split_verb, table};
use crate::auth::Permission;

/// Name of the security scheme.
const BEARER: &str = "bearer";

/// The document.
pub fn document() -> OpenApi {
    let mut components = Components::new();
    components.add_security_scheme(BEARER, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    let mut paths = PathsBuilder::new().build();
    for route in table() {
        for (name, schema) in &route.schemas {
            components.schemas.insert(name.clone(), schema.clone());
        }
        paths.add_path_operation(route.path, vec![http_method(route)], describe(route));
    }
    components.schemas.insert(Problem::name().into_owned(), Problem::schema());
    components.schemas.insert(FieldError::name().into_owned(), FieldError::schema());
    // Parameters do not bring the schemas they refer to.
    components.schemas.insert(Consistency::name().into_owned(), Consistency::schema());
    let info = InfoBuilder::new()
        .title("Optimus")
        .version("v1")
        .description(Some(
            "Runs a team's software on the team's own hosts. Additive within v1: clients ignore fields and values they do not know. \
             Times are RFC 3339, spans such as `30s`, sizes integer bytes, cpu in cores. Every error is `application/problem+json` with a stable code.",
        ))
        .license(None)
        .build();
    let tags = ["server", "workloads", "allocations", "deployments", "nodes", "placement", "cluster", "events"].map(Tag::new);
    OpenApiBuilder::new().info(info).paths(paths).components(Some(components)).tags(Some(tags)).build()
}

/// The document as it is served and checked in.
pub fn document_json() -> Bytes {
    let mut text = document().to_pretty_json().expect("the document holds strings and numbers only");
    text.push('\n');
    text.into()
}

fn http_method(route: &Route) -> HttpMethod {
    match route.method.as_str() {
        "POST" => HttpMethod::Post,
        "DELETE" => HttpMethod::Delete,
        "PUT" => HttpMethod::Put,
        _ => HttpMethod::Get,
    }
}

/// What all operations share is added here, so that no handler can forget it.
fn describe(route: &Route) -> Operation {
    let mut operation = route.operation.clone();
    operation.extensions = Some(ExtensionsBuilder::new().add("x-permission", route.permission.as_str()).build());
    operation.security = Some(match route.permission {
        Permission::Public => vec![],
        _ => vec![SecurityRequirement::new(BEARER, Vec::<String>::new())],
    });
    let parameters = operation.parameters.get_or_insert_with(Vec::new);
    for name in path_parameters(route.path) {
        if !parameters.iter().any(|parameter| matches!(parameter, RefOr::T(parameter) if parameter.name == name)) {
            let parameter = ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Path)
                .required(Required::True)
                .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
                .build();
            parameters.push(RefOr::T(parameter));
        }
    }
    if route.method != http::Method::GET && route.permission != Permission::Tokens {
        let key = ParameterBuilder::new()
            .name("Idempotency-Key")
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some("A retry with the same key and body has one effect and gets the same answer."))
            .schema(Some(ObjectBuilder::new().schema_type(Type::String).max_length(Some(255))))
            .build();
        parameters.push(RefOr::T(key));
    }
    for (status, response) in errors(route) {
        operation.responses.responses.entry(status.to_owned()).or_insert(RefOr::T(response));
    }
    for response in operation.responses.responses.values_mut() {
        if let RefOr::T(response) = response {
            let id = HeaderBuilder::new()
                .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
                .description(Some("Found in the server's log."));
            response.headers.insert("X-Request-Id".into(), RefOr::T(id.build()));
        }
    }
    operation
}

fn path_parameters(path: &str) -> Vec<&str> {
    split_verb(path).0.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}')).collect()
}

fn errors(route: &Route) -> Vec<(&'static str, Response)> {
    let has_parameters = route.path.contains('{');
    let mut errors = vec![
        ("400", "The request is malformed."),
        ("403", "The host, the origin or the credential does not allow it."),
        ("405", "The method is not possible here; `Allow` lists those that are."),
        ("500", "A fault of the server."),
        ("503", "No leader, or too busy; `Retry-After` says when to try again."),
        ("504", "No answer in time. A write may have taken effect."),
    ];
    if route.permission != Permission::Public {
        errors.push(("401", "No valid credential."));
        errors.push(("429", "Too many wrong credentials from this address."));
    }
    if has_parameters || route.path == "/v1/status" {
        errors.push(("404", "There is no such object."));
    }
    if route.method == http::Method::GET && route.patience == Patience::Waits {
        errors.push(("304", ""));
    }
    if route.path == "/v1/events" {
        errors.push(("410", "Events after `since` are no longer kept."));
    }
    if route.method != http::Method::GET {
        errors.push(("409", "The state does not allow it."));
        errors.push(("413", "The body is too large."));
        errors.push(("415", "The body is not JSON."));
        errors.push(("422", "The body breaks a rule, or the Idempotency-Key was used for another request."));
    }
    errors.into_iter().map(|(status, what)| (status, if what.is_empty() { unmodified() } else { problem(what) })).collect()
}

fn unmodified() -> Response {
    ResponseBuilder::new().description("As `If-None-Match` says you have it.").build()
}

fn problem(what: &str) -> Response {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(Problem::name()))).build();
    ResponseBuilder::new().description(what).content(PROBLEM_JSON, content).build()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_document_is_the_one_served() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/openapi-v1.json");
        let document = document_json();
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &document).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_default();
        assert!(kept == document, "docs/reference/openapi-v1.json differs from the routes; rewrite it with UPDATE_EXPECT=1");
    }

    #[test]
    fn every_route_is_documented_with_its_permission() {
        let document: serde_json::Value = serde_json::from_slice(&document_json()).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        let mut operations = 0;
        let mut ids = std::collections::BTreeSet::new();
        for route in table() {
            let operation = &document["paths"][route.path][route.method.as_str().to_ascii_lowercase()];
            assert_eq!(operation["x-permission"], route.permission.as_str(), "{} {}", route.method, route.path);
            assert_eq!(operation["security"].as_array().unwrap().is_empty(), route.permission == Permission::Public);
            assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{operation}");
        }
        for (_, item) in document["paths"].as_object().unwrap() {
            operations += item.as_object().unwrap().len();
        }
        assert_eq!(operations, table().len(), "the document has operations that are not in the table");
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn walk(value: &serde_json::Value, root: &serde_json::Value) {
            match value {
                serde_json::Value::Object(map) => {
                    if let Some(reference) = map.get("$ref").and_then(|r| r.as_str()) {
                        assert!(root.pointer(reference.strip_prefix('#').unwrap()).is_some(), "{reference} leads nowhere");
                    }
                    map.values().for_each(|value| walk(value, root));
                }
                serde_json::Value::Array(items) => items.iter().for_each(|value| walk(value, root)),
                _ => {}
            }
        }
        let document: serde_json::Value = serde_json::from_slice(&document_json()).unwrap();
        walk(&document, &document);
    }
}
