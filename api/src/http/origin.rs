//! Which pages may open a WebSocket. A browser names a page's origin; other programs name none.
use axum::http::{HeaderMap, Uri, header};

/// The origins that are let in.
#[derive(Debug, Clone, Default)]
pub struct Origins(Vec<String>);

impl Origins {
    /// Of URLs, scheme, host and port count. One that is none lets nobody in.
    #[must_use]
    pub fn new<'a>(urls: impl IntoIterator<Item = &'a str>) -> Self {
        Self(urls.into_iter().filter_map(origin).collect())
    }

    /// May this request come in? Also when it names no origin: then no page sent it, and its credential decides alone.
    #[must_use]
    pub fn allow(&self, headers: &HeaderMap) -> bool {
        let mut named = headers.get_all(header::ORIGIN).iter();
        match (named.next(), named.next()) {
            (None, _) => true,
            (Some(only), None) => {
                only.to_str().ok().and_then(origin).is_some_and(|origin| self.0.contains(&origin))
            }
            (Some(_), Some(_)) => false,
        }
    }
}

/// `scheme://host[:port]` in lower case, without the scheme's own port, as browsers write it.
fn origin(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let host = uri.host()?.to_ascii_lowercase();
    let own = match scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let port = uri.port_u16().filter(|port| *port != own);
    Some(port.map_or_else(|| format!("{scheme}://{host}"), |port| format!("{scheme}://{host}:{port}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(sent: &[&str]) -> bool {
        let origins = Origins::new(["https://Exam.example.org/carrel", "http://[::1]:8080", "nonsense"]);
        let mut headers = HeaderMap::new();
        for value in sent {
            headers.append(header::ORIGIN, value.parse().unwrap());
        }
        origins.allow(&headers)
    }

    #[test]
    fn the_public_url_and_the_allow_list_are_let_in_and_so_is_what_is_no_page() {
        assert!(allowed(&[]));
        assert!(allowed(&["https://exam.example.org"]));
        assert!(allowed(&["https://exam.example.org:443"]));
        assert!(allowed(&["http://[::1]:8080"]));
    }

    #[test]
    fn every_other_page_is_not() {
        for other in [
            "null",
            "",
            "http://exam.example.org",
            "https://exam.example.org:8443",
            "https://exam.example.org.evil.example",
            "https://evil.example/https://exam.example.org",
            "http://[::1]",
            "nonsense",
        ] {
            assert!(!allowed(&[other]), "{other}");
        }
        assert!(!allowed(&["https://exam.example.org", "https://evil.example"]));
    }
}
