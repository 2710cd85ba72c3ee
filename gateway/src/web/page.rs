//! The page and what it loads. It is the same for every session and shows nothing without a credential, so that it asks for none.
use axum::{
    body::Body,
    extract::Path,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use rust_embed::RustEmbed;

#[derive(RustEmbed)]
#[folder = "page/dist/"]
struct Files;

/// The names of assets carry a hash of their content.
const FOR_EVER: &str = "public, max-age=31536000, immutable";

/// `GET /session/{session_id}`.
pub async fn page() -> Response {
    let Some(html) = Files::get("index.html") else {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            "This carrel was built without its web page: build it with make build.\n",
        )
            .into_response();
    };
    // 122 random bits, new for every answer.
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let html = String::from_utf8_lossy(&html.data).replace("{{nonce}}", &nonce);
    // Style elements: xterm.js makes three, and the page gives them its nonce. Style attributes: xterm.js sets them for every
    // cell with a colour of its own, and an attribute takes no nonce; it can neither select nor load anything.
    let policy = format!(
        "default-src 'none'; script-src 'self'; style-src-elem 'self' 'nonce-{nonce}'; style-src-attr 'unsafe-inline'; \
         img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mut response = ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response();
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=()"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// `GET /assets/{file}`.
pub async fn asset(Path(file): Path<String>, request: HeaderMap) -> Response {
    let gzip = accepts_gzip(&request).then(|| Files::get(&format!("assets/{file}.gz"))).flatten();
    let encoded = gzip.is_some();
    let Some(found) = gzip.or_else(|| Files::get(&format!("assets/{file}"))) else {
        return (StatusCode::NOT_FOUND, "There is no such file.\n").into_response();
    };
    let kind = match file.rsplit_once('.') {
        Some((_, "js")) => "text/javascript; charset=utf-8",
        Some((_, "css")) => "text/css; charset=utf-8",
        _ => "application/octet-stream",
    };
    let mut response = Response::new(Body::from(found.data.into_owned()));
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, FOR_EVER),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::VARY, "accept-encoding"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if encoded {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

fn accepts_gzip(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').any(|coding| {
            let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
            let refused =
                weight.trim().strip_prefix("q=").is_some_and(|q| q.trim_matches(['0', '.']).is_empty());
            name.trim().eq_ignore_ascii_case("gzip") && !refused
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_files_go_only_to_those_who_take_them() {
        for (sent, expected) in [
            ("gzip", true),
            ("br, GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("gzip; q=0.000", false),
            ("br", false),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(sent));
            assert_eq!(accepts_gzip(&headers), expected, "{sent}");
        }
    }

    #[tokio::test]
    async fn the_page_lets_no_other_script_or_style_in() {
        let answer = page().await;
        if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
            return;
        }
        let policy =
            answer.headers().get(header::CONTENT_SECURITY_POLICY).unwrap().to_str().unwrap().to_owned();
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
        let other = page().await;
        assert_ne!(other.headers().get(header::CONTENT_SECURITY_POLICY).unwrap().to_str().unwrap(), policy);
    }
}
