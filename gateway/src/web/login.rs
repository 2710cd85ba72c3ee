//! How a browser or a WebSocket client says who it is. Whether that is true is decided by [`Auth`].
use std::net::{IpAddr, SocketAddr};

use axum::{
    body::Bytes,
    extract::{ConnectInfo, Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use carrel_api::{
    access::{Access, Auth, COOKIE, LoginError},
    identity::SessionId,
    store::{Channel, Outcome},
};
use serde::Deserialize;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{WebState, error};

/// Largest body of a login, bytes.
const BODY: usize = 1024;

/// What a request carries.
pub enum Credential {
    /// A caller's own token.
    Bearer(Zeroizing<String>),
    /// Used once.
    Ticket(Zeroizing<String>),
    /// What the page got for its ticket.
    Cookie(Zeroizing<String>),
}

/// Why somebody is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotIn {
    /// No credential, or not a good one.
    Unauthenticated,
    /// A good one, but not for this session; or there is no such session.
    Denied,
    /// It cannot be checked now.
    Unavailable,
}

/// The one that counts: the header before the ticket before the cookie.
pub fn credential(headers: &HeaderMap, ticket: Option<String>) -> Option<Credential> {
    let secret = |text: &str| Zeroizing::new(text.to_owned());
    if let Some(header) = headers.get(header::AUTHORIZATION) {
        // A header that is no bearer token is a wrong credential, not none.
        let token = header
            .to_str()
            .ok()
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        return Some(Credential::Bearer(secret(token.map_or("", |(_, token)| token.trim()))));
    }
    if let Some(ticket) = ticket {
        return Some(Credential::Ticket(Zeroizing::new(ticket)));
    }
    cookie(headers).map(|value| Credential::Cookie(secret(value)))
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(name, value)| (name == COOKIE).then_some(value))
}

/// Lets in, or not, and writes down which. `session_id` is `None` for one that is malformed: it is looked for like any other.
pub async fn enter(
    auth: &Auth,
    session_id: Option<SessionId>,
    credential: Credential,
    from: IpAddr,
) -> Result<Access, NotIn> {
    let wanted = session_id.unwrap_or_else(|| Uuid::nil().into());
    let entered = match &credential {
        Credential::Bearer(token) => match auth.caller(token).await {
            Ok(caller) => auth.enter(&caller, wanted).await.map_err(|error| refused(error, NotIn::Denied)),
            Err(error) => Err(refused(error, NotIn::Unauthenticated)),
        },
        Credential::Ticket(ticket) => {
            auth.ticket(wanted, ticket).await.map_err(|error| refused(error, NotIn::Unauthenticated))
        }
        Credential::Cookie(value) => {
            auth.cookie(wanted, value).await.map_err(|error| refused(error, NotIn::Unauthenticated))
        }
    };
    record(auth, session_id, entered.as_ref(), from);
    entered
}

fn refused(error: LoginError, denied: NotIn) -> NotIn {
    match error {
        LoginError::Denied => denied,
        LoginError::Overloaded | LoginError::Unavailable => NotIn::Unavailable,
    }
}

fn record(auth: &Auth, session_id: Option<SessionId>, entered: Result<&Access, &NotIn>, from: IpAddr) {
    let (user_id, outcome) = match entered {
        Ok(access) => (Some(access.user_id()), Outcome::Granted),
        Err(NotIn::Unauthenticated | NotIn::Denied) => (None, Outcome::Denied),
        // Nothing was decided, and the database would not take it.
        Err(NotIn::Unavailable) => return,
    };
    auth.record(Channel::Browser, from, (session_id, user_id), outcome);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Login {
    ticket: String,
}

/// `POST /session/{session_id}/login`: a page's ticket for a cookie.
pub async fn login(
    State(state): State<WebState>,
    Path(session_id): Path<String>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if !state.0.origins.allow(&headers) {
        return error(StatusCode::FORBIDDEN, "ORIGIN_NOT_ALLOWED", "this page's origin is not let in");
    }
    // The type makes a browser ask first before it sends this for a page of another origin.
    let json = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    let login = if json && body.len() <= BODY { serde_json::from_slice::<Login>(&body).ok() } else { None };
    let Some(login) = login else {
        return error(
            StatusCode::BAD_REQUEST,
            "INVALID_REQUEST",
            r#"the body must be the JSON {"ticket":"…"}"#,
        );
    };
    let session_id = session_id.parse::<SessionId>().ok();
    let traded = match state.0.auth.trade(&Zeroizing::new(login.ticket)).await {
        // A ticket for another session is used up by this.
        Ok((access, _)) if Some(access.session_id()) != session_id => Err(NotIn::Unauthenticated),
        Ok(traded) => Ok(traded),
        Err(error) => Err(refused(error, NotIn::Unauthenticated)),
    };
    record(&state.0.auth, session_id, traded.as_ref().map(|(access, _)| access), peer.ip());
    let (access, cookie) = match traded {
        Ok(traded) => traded,
        Err(NotIn::Unavailable) => {
            return error(
                StatusCode::SERVICE_UNAVAILABLE,
                "BACKEND_UNAVAILABLE",
                "logins cannot be checked now; try again",
            );
        }
        Err(_) => {
            return error(
                StatusCode::UNAUTHORIZED,
                "UNAUTHENTICATED",
                "this ticket is wrong, too old, or used up",
            );
        }
    };
    let secure = if state.0.secure { "; Secure" } else { "" };
    // Its path is the session's in the API: the terminal and the status are its only uses.
    let text = Zeroizing::new(format!(
        "{COOKIE}={}; Path=/v1/sessions/{}; Max-Age={}; HttpOnly; SameSite=Strict{secure}",
        *cookie.value,
        access.session_id(),
        cookie.max_age
    ));
    let Ok(mut value) = HeaderValue::from_str(&text) else {
        return error(StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", "the cookie could not be made");
    };
    value.set_sensitive(true);
    let mut response = StatusCode::NO_CONTENT.into_response();
    response.headers_mut().insert(header::SET_COOKIE, value);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(
        headers: &[(header::HeaderName, &'static str)],
        ticket: Option<&str>,
    ) -> Option<(&'static str, String)> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, HeaderValue::from_static(value));
        }
        credential(&map, ticket.map(str::to_owned)).map(|credential| match credential {
            Credential::Bearer(text) => ("bearer", text.to_string()),
            Credential::Ticket(text) => ("ticket", text.to_string()),
            Credential::Cookie(text) => ("cookie", text.to_string()),
        })
    }

    #[test]
    fn one_credential_counts_and_a_bad_header_is_not_overlooked() {
        let cookie = (header::COOKIE, "other=1; carrel_page=a.b.c; carrel_page2=x");
        assert_eq!(found(&[], None), None);
        assert_eq!(found(std::slice::from_ref(&cookie), None), Some(("cookie", "a.b.c".to_owned())));
        assert_eq!(found(std::slice::from_ref(&cookie), Some("t")), Some(("ticket", "t".to_owned())));
        let bearer = (header::AUTHORIZATION, "bearer tok");
        assert_eq!(found(&[bearer, cookie.clone()], Some("t")), Some(("bearer", "tok".to_owned())));
        let basic = (header::AUTHORIZATION, "Basic dTpw");
        assert_eq!(found(&[basic, cookie], None), Some(("bearer", String::new())));
    }
}
